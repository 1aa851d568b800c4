"""``python -m midl``: the console command, for launchers that start Python modules."""

from midl.cli import main

if __name__ == "__main__":
    main()
