"""How many CPUs this process may use, and how much memory. Imports no torch: prepare scripts use it."""
import math
import os
from pathlib import Path


def usable_cpus():
    """Return how many CPUs this process may use: at least 1, at most its affinity and its container's quota allow."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cgroup_quota())))


def _cgroup_files(controller, version_1, version_2, proc, root):
    """Yield the texts of these files, joined, in this process's cgroup and in each of its parents.

    Version 2 has one hierarchy, and version 1 one per controller: "0::/user.slice" or "4:cpu,cpuacct:/docker/1f0c".
    """
    for line in _read(proc).splitlines():
        controllers, _, group = line.partition(':')[2].partition(':')
        if controllers == '':
            mounts, names = [Path(root), Path(root, 'unified')], version_2
        elif controller in controllers.split(','):
            mounts, names = [Path(root, controllers), Path(root, controller)], version_1
        else:
            continue
        for mount in mounts:
            folder = mount / group.strip('/')  # in a container this is often the host's path, which does not exist
            while folder.is_relative_to(mount):
                yield ' '.join(_read(folder / name) for name in names)
                folder = folder.parent


def _cgroup_quota(proc='/proc/self/cgroup', root='/sys/fs/cgroup'):
    """Return the smallest CPU quota, in CPUs, of this process's cgroup and its parents; inf if there is none.

    It is "200000 100000" (microseconds per period), or "max 100000" or "-1 100000" for none.
    """
    quota = math.inf
    for text in _cgroup_files('cpu', ('cpu.cfs_quota_us', 'cpu.cfs_period_us'), ('cpu.max',), proc, root):
        words = text.split()
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
            quota = min(quota, int(words[0]) / int(words[1]))
    return quota


def _read(path):
    """Return the text of a small file, or '' if it cannot be read."""
    try:
        return Path(path).read_text(encoding='utf-8')
    except (OSError, ValueError):
        return ''


def physical_memory(proc='/proc/self/cgroup', root='/sys/fs/cgroup'):
    """Return the bytes of memory that this process may use: those of the machine, or fewer in a container.

    0 if the machine does not say (Windows).
    """
    try:
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (ValueError, OSError, AttributeError):
        return 0
    limits = _cgroup_files('memory', ('memory.limit_in_bytes',), ('memory.max',), proc, root)  # 'max' for none
    return min([memory, *(int(text) for text in limits if text.strip().isdecimal())])
