"""``python -m captum_fam`` is the command ``captum-fam``."""

from captum_fam.cli import main

if __name__ == "__main__":
    main()
