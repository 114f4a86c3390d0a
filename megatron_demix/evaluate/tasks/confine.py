"""Runs a Python program that nobody has read, from standard input: `python -I confine.py '{"memory_bytes": ..., ...}'`.

In front of it is a line with a token, which goes to the descriptor `verdict` when the program has come to its end.

A script with the standard library alone; megatron_demix.evaluate.tasks.sandbox starts it. First this process gives up what the
program must not have. Where the kernel lets an ordinary user make namespaces: the network, every process outside, and writing
any file but those in an empty folder in memory. Where the kernel has Landlock (since 5.13), whoever the user is: all files but
those of that folder and, to read, of Python and the system; since 6.12 also signals to processes outside. Everywhere: memory,
processor time, open files, large files, core dumps, outliving whoever started it, and many processes (except for root, whose
the kernel does not count); on x86-64 and 64-bit ARM sockets, among them those that files lead to, such as a container daemon's,
memory that outlives its processes, and other processes' limits. Memory is counted by process: all of them may have it.
Then the program runs in a child that is the first process of its namespace, so that all it has started ends with it.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 16384, 1 << 18
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER, _SECCOMP_RET_ALLOW, _SECCOMP_RET_ERRNO = 2, 0x7FFF0000, 0x00050000
_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # instructions of the kernel's packet filters
# The processor's name; socket(2), shmget(2), semget(2), msgget(2); socketpair(2); prlimit(2).
_CALLS = {
    "x86_64": (0xC000003E, (41, 29, 64, 68), 53, 302),
    "aarch64": (0xC00000B7, (198, 194, 190, 186), 199, 261),
}
_SOCK_STREAM = 1
_IO_URING_SETUP, _X32 = 425, 0x40000000  # another way to sockets; other numbers for the same calls
_SYS_LANDLOCK = 444, 445, 446  # make a ruleset, add a rule, restrict this process; of all processors
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH, _O_PATH = 1, 1, 0o10000000
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # how many rights to files a version knows
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEVICE = (1 << bit for bit in (0, 1, 2, 3, 14, 15))
_SCOPED_SINCE, _SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 6, 1, 2
_SOFTWARE = (sys.prefix, sys.base_prefix, "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix")
_SYSTEM_FILES = tuple(f"/etc/{n}" for n in ("ld.so.cache", "localtime", "passwd", "nsswitch.conf", "mime.types")) + tuple(
    f"/proc/{n}" for n in ("cpuinfo", "meminfo", "stat")
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_INSIDE_ID = 1000  # anyone but root, so that a program that is started gains no capabilities

ISOLATED = "isolated"
"""What a probe prints where network, sockets, writing files and other processes are out of reach."""


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def isolate(libc: ctypes.CDLL, folder: str) -> bool:
    """Enter namespaces without network and other processes, in which nothing can be written but `folder`. False if the kernel
    refuses."""
    uid, gid = os.getuid(), os.getgid()
    flags = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWIPC | _CLONE_NEWUTS
    if libc.unshare(flags) != 0:
        return False
    try:
        for file, line in (("setgroups", "deny"), ("uid_map", f"{_INSIDE_ID} {uid} 1"), ("gid_map", f"{_INSIDE_ID} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(line)
    except OSError:
        return False
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    read_only = _MountAttributes(attr_set=_MOUNT_ATTR_RDONLY)
    place = (_AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(read_only), ctypes.sizeof(read_only))
    if libc.syscall(_SYS_MOUNT_SETATTR, *place) != 0:
        return False
    return libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=64m,mode=700") == 0


def tasks_of_user() -> int:
    """Processes and threads of this user: outside a namespace of the program's own, the kernel counts all of them."""
    count = 0
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{number}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{number}/task"))
        except OSError:
            pass  # gone meanwhile
    return count


def limit(settings: dict, others: int) -> None:
    """Give up what needs no namespace. others: what counts as the program's processes and is not."""

    def at_most(kind: int, value: int) -> None:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))

    at_most(resource.RLIMIT_AS, settings["memory_bytes"])
    at_most(resource.RLIMIT_CPU, settings["cpu_s"])
    at_most(resource.RLIMIT_FSIZE, settings["file_bytes"])
    at_most(resource.RLIMIT_NOFILE, 64)
    at_most(resource.RLIMIT_NPROC, settings["processes"] + others)
    at_most(resource.RLIMIT_CORE, 0)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Those of the new user namespace too: with them the program could undo all this."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0 or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        os._exit(125)


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("then", ctypes.c_uint8), ("otherwise", ctypes.c_uint8), ("value", ctypes.c_uint32)]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def refuse_calls(libc: ctypes.CDLL) -> bool:
    """From now on calls fail that make sockets, or what stays in memory when all processes have ended, or set another process's
    limits, which Landlock does not know; False if the kernel has no filters, or the processor is another.

    Pairs of streams, which asyncio and multiprocessing need, can still be made: they stay connected to each other, while a
    datagram socket of a pair could send to any other that a file leads to.
    """
    if os.uname().machine not in _CALLS:
        return False
    processor, refused, socketpair, prlimit = _CALLS[os.uname().machine]
    # A name to go to, the instruction, where to go if it holds, and if it does not (nowhere: to the next line), its value.
    program = (
        ("", _LOAD, "", "", 4),  # the processor that the call is made for
        ("", _IF_EQUAL, "", "refuse", processor),
        ("", _LOAD, "", "", 0),  # the call's number
        ("", _IF_AT_LEAST, "refuse", "", _X32),
        *(("", _IF_EQUAL, "refuse", "", number) for number in (_IO_URING_SETUP, *refused)),
        ("", _IF_EQUAL, "pair", "", socketpair),
        ("", _IF_EQUAL, "", "allow", prlimit),
        ("", _LOAD, "", "", 16),  # its first argument, the process; 0: the one that calls
        ("", _IF_EQUAL, "allow", "refuse", 0),
        ("pair", _LOAD, "", "", 24),  # its second argument, the type, and flags
        ("", _AND, "", "", 0xF),
        ("", _IF_EQUAL, "allow", "refuse", _SOCK_STREAM),
        ("allow", _RETURN, "", "", _SECCOMP_RET_ALLOW),
        ("refuse", _RETURN, "", "", _SECCOMP_RET_ERRNO | errno.EACCES),
    )
    places = {name: at for at, (name, *_) in enumerate(program)}
    instructions = (_Instruction * len(program))(
        *(
            _Instruction(code, *(places[to] - at - 1 if to else 0 for to in (then, otherwise)), value)
            for at, (_, code, then, otherwise, value) in enumerate(program)
        )
    )
    return libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Filter(len(program), instructions)), 0, 0) == 0


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scoped")]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("descriptor", ctypes.c_int32)]


def library_folders() -> set:
    """Where the libraries lie that Python has loaded: on a cluster, what it loads later may come from there."""
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split(None, 5)[5].strip() for line in maps if ".so" in line}
    except OSError:
        return set()
    return {os.path.dirname(file) for file in files if file.startswith("/")}


def restrict_files(libc: ctypes.CDLL, folder: str, software: set) -> int:
    """From now on only `folder` can be written, and only software and the system be read. Returns the version of the kernel's
    Landlock, 0 if it has none or refuses: then nothing is restricted."""
    make, add, restrict = _SYS_LANDLOCK
    version = max(0, libc.syscall(make, None, 0, _LANDLOCK_VERSION))
    if version == 0:
        return 0
    everything = (1 << _LANDLOCK_RIGHTS[max(known for known in _LANDLOCK_RIGHTS if known <= version)]) - 1
    scoped = version >= _SCOPED_SINCE
    ruleset = _Ruleset(everything, 0, (_SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS) if scoped else 0)
    made = libc.syscall(make, ctypes.byref(ruleset), 24 if scoped else 8, 0)
    if made < 0:
        return 0
    of_files = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
    rules = dict.fromkeys((*software, *_SYSTEM_FILES), _EXECUTE | _READ_FILE | _READ_DIR)
    rules |= dict.fromkeys(_DEVICES, _READ_FILE | _WRITE_FILE)
    for path, allowed in (rules | {folder: everything}).items():
        try:
            opened = os.open(path, _O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this machine
        rights = allowed & everything if os.path.isdir(path) else allowed & everything & of_files
        # What cannot be added, on a file system that Landlock does not know, stays out of reach.
        libc.syscall(add, made, _LANDLOCK_PATH_BENEATH, ctypes.byref(_PathBeneath(rights, opened)), 0)
        os.close(opened)
    restricted = libc.syscall(restrict, made, 0) == 0
    os.close(made)
    return version if restricted else 0


def main() -> None:
    settings = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    token = sys.stdin.readline()
    program = sys.stdin.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # what it was, a file, holds the token
    folder = os.getcwd()
    sys.path += settings["packages"]
    software = {*_SOFTWARE, *settings["packages"], *library_folders()}
    isolated = settings["isolate"] and isolate(libc, folder)
    others = 0 if isolated else tasks_of_user()
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        # Ending by the child's signal would be as good, but a first process of a namespace can only be killed from outside.
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(folder)
    limit(settings, others)
    drop_capabilities(libc)
    isolated = restrict_files(libc, folder, software) >= _SCOPED_SINCE or isolated
    isolated = refuse_calls(libc) and isolated
    if settings["probe"]:
        print(ISOLATED if isolated else "limits")
    sys.argv = ["program.py"]
    # Not as __main__, nor do data sets' own judges: what a script would do besides is no part of an answer.
    module = sys.modules["program"] = type(sys)("program")
    exec(compile(program, "program.py", "exec"), vars(module))
    # A program that leaves early, with whatever exit code, has not passed the tests behind it.
    os.write(settings["verdict"], token.encode())


if __name__ == "__main__":
    main()
