"""How many CPUs this process may use, and how much memory there is. Imports no torch: prepare scripts use it."""
import math
import os
from pathlib import Path


def usable_cpus():
    """Return how many CPUs this process may use: at least 1, at most its affinity and its container's quota allow."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cgroup_quota())))


def _cgroup_quota(proc='/proc/self/cgroup', root='/sys/fs/cgroup'):
    """Return the smallest CPU quota, in CPUs, of this process's cgroup and its parents; inf if there is none.

    Version 2 has one hierarchy and the file cpu.max, "200000 100000" (microseconds per period) or "max 100000".
    Version 1 has a hierarchy per controller and two files, cpu.cfs_quota_us (-1: no quota) and cpu.cfs_period_us.
    """
    quota = math.inf
    for line in _read(proc).splitlines():  # as in "0::/user.slice" or "4:cpu,cpuacct:/docker/1f0c"
        controllers, _, group = line.partition(':')[2].partition(':')
        if controllers == '':
            mounts, names = [Path(root), Path(root, 'unified')], ('cpu.max',)
        elif 'cpu' in controllers.split(','):
            mounts, names = [Path(root, controllers), Path(root, 'cpu')], ('cpu.cfs_quota_us', 'cpu.cfs_period_us')
        else:
            continue
        for mount in mounts:
            folder = mount / group.strip('/')  # in a container this is often the host's path, which does not exist
            while folder.is_relative_to(mount):
                words = ' '.join(_read(folder / name) for name in names).split()
                if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
                    quota = min(quota, int(words[0]) / int(words[1]))
                folder = folder.parent
    return quota


def _read(path):
    """Return the text of a small file, or '' if it cannot be read."""
    try:
        return Path(path).read_text(encoding='utf-8')
    except (OSError, ValueError):
        return ''


def physical_memory():
    """Return the bytes of memory of this machine, 0 if it does not say (Windows)."""
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (ValueError, OSError, AttributeError):
        return 0
