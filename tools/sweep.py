"""``most sweep`` from a checkout."""

from megatron_most.commands.sweep import main

if __name__ == "__main__":
    main()
