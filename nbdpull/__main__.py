"""``python -m nbdpull``: the command line."""

from nbdpull.cli.main import main

if __name__ == "__main__":
    main()
