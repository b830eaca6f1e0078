"""``most generate`` from a checkout."""

from megatron_most.commands.generate import main

if __name__ == "__main__":
    main()
