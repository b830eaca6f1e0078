"""``most evaluate`` from a checkout."""

from megatron_most.commands.evaluate import main

if __name__ == "__main__":
    main()
