"""``most plan`` from a checkout."""

from megatron_most.commands.plan import main

if __name__ == "__main__":
    main()
