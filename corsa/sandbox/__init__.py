"""Runs untrusted programs and judges them by tests that they cannot reach.

    outside    worker.py       starts a sandbox, sends it programs, reads verdicts, finds the cause of a failure
               batch.py        many programs: several sandboxes, cached verdicts
               verdicts.py     the verdict on a program; texts.py cleans all its texts
    inside     supervisor.py   the trusted process: hands out programs and tests, and watches them
               zygote.py       forks a process for each program; a second zygote forks one for its tests
               program.py      runs the program and answers calls to its functions
               test_runner.py  runs the tests, calls the program's functions; only it has the pipe for the verdict
               protocol.py     messages between these two; values.py, packages.py, expressions.py: the values in them
    isolation  entering.py     the namespaces of a sandbox; rooting.py: its file system
               confinement.py  limits and loss of privileges of a process that runs a program or its tests
               kernel.py       system calls missing in the standard library; syscalls.py: the system call filter
               memory.py       memory used by all processes together; cgroup.py: the kernel's limit, where available

docs/sandbox.md says what a program cannot do, and what is not defended.
"""
