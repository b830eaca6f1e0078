"""``most convert`` from a checkout."""

from megatron_most.commands.convert import main

if __name__ == "__main__":
    main()
