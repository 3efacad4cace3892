"""`python -m swlora` is the command `swlora`."""

from swlora.cli import main

main()
