"""Running programs that nobody trusts, and judging them by tests they cannot reach.

    host     slot.py     starts a sandbox, hands it programs, reads verdicts; knows when it broke
    inside   warden.py   the trusted process of a sandbox: forks two processes for each program and watches them
             program.py  one of them: runs the program, answers calls to its functions
             examiner.py the other: runs the tests, calls the program's functions, alone holds the verdict's pipe
             wire.py     what passes between the two: data, never code, towards the examiner
             kernel.py   the system calls that the standard library lacks
             rooting.py  the file system a program sees

See docs/sandbox.md for what is kept from a program and what is not.
"""
