"""``most prepare`` from a checkout."""

from megatron_most.commands.prepare import main

if __name__ == "__main__":
    main()
