"""`python -m batchnorm.cli`, for where the installed script is not on the path."""

from batchnorm.cli import main

if __name__ == "__main__":
    main()
