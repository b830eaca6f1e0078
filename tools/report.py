"""``most report`` from a checkout."""

from megatron_most.commands.report import main

if __name__ == "__main__":
    main()
