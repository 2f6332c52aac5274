"""`python -m lacy`, and what `torchrun -m lacy` starts."""

from lacy.cli import main

if __name__ == "__main__":
    main()
