"""``most train`` from a checkout."""

from megatron_most.commands.train import main

if __name__ == "__main__":
    main()
