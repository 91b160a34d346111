"""`python -m service.cli` is `tunesmith`."""

from service.cli import main

if __name__ == "__main__":
    main()
