"""Running programs that nobody trusts, and judging them by tests they cannot reach.

    outside  worker.py       starts a sandbox, hands it programs, reads verdicts, says whose fault a break is
             batch.py        many programs: several sandboxes, verdicts remembered
             verdicts.py     what is said of a program; texts.py cleans every text of it
    inside   supervisor.py   the trusted process: hands out programs and tests, and watches
             zygote.py       forks a process for each program; another one, for its tests
             program.py      such a process: runs the program, answers calls to its functions
             test_runner.py  the other: runs the tests, calls the program's functions, alone holds the verdict's pipe
             protocol.py     what passes between the two; values.py, packages.py, expressions.py: the
                             kinds of values
    walls    entering.py     the namespaces of a sandbox; rooting.py: its file system
             confinement.py  what is taken from a process that runs a program or its tests
             kernel.py       system calls that the standard library lacks; syscalls.py: the filter of system calls
             memory.py       what processes hold together; cgroup.py: the kernel's bound on it, where it can be had

See docs/sandbox.md for what is kept from a program and what is not.
"""
