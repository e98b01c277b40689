//! How much memory there is, and how much this process has used.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Bytes that this process can still take before the machine or its container runs out; `None` where that is unknown.
///
/// On Linux the least of what the kernel estimates (`MemAvailable`) and what every enclosing control group has left
/// (version 1 and 2), where cached file pages count as free. Elsewhere `None`.
pub fn available() -> Option<u64> {
    let machine = read("/proc/meminfo").and_then(|text| field_kib(&text, "MemAvailable:"));
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    group_folders(&groups).iter().filter_map(Group::headroom).chain(machine).min()
}

/// Most bytes of physical memory that this process has held so far (`VmHWM`), mapped files included; `None` where that is
/// unknown, which is everywhere but on Linux.
pub fn peak_resident() -> Option<u64> {
    field_kib(&read("/proc/self/status")?, "VmHWM:")
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// Value in bytes of a line such as `MemAvailable:   1234 kB`.
fn field_kib(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A control group's folder and the names of its files.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`: file pages that the kernel drops under pressure.
    cached: [&'static str; 2],
}

impl Group {
    fn v1(folder: PathBuf) -> Self {
        let cached = ["total_active_file", "total_inactive_file"];
        Self { folder, limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes", cached }
    }

    fn v2(folder: PathBuf) -> Self {
        Self { folder, limit: "memory.max", usage: "memory.current", cached: ["active_file", "inactive_file"] }
    }

    fn headroom(&self) -> Option<u64> {
        let file = |name| read(self.folder.join(name));
        headroom(&file(self.limit)?, &file(self.usage)?, &file("memory.stat").unwrap_or_default(), self.cached)
    }
}

/// What a group has left, from the texts of its files; `None` if it has no limit (`max`).
fn headroom(limit: &str, usage: &str, stat: &str, cached: [&str; 2]) -> Option<u64> {
    let limit: u64 = limit.trim().parse().ok()?;
    let usage: u64 = usage.trim().parse().ok()?;
    let cached: u64 = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| cached.contains(name))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .fold(0, u64::saturating_add);
    Some(limit.saturating_sub(usage.saturating_sub(cached)))
}

/// The memory groups that `/proc/self/cgroup` puts this process in, with all that enclose them: each may have a limit.
fn group_folders(text: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, group): (&str, fn(PathBuf) -> Group) = if controllers.is_empty() {
            ("/sys/fs/cgroup", Group::v2)
        } else if controllers.split(',').any(|name| name == "memory") {
            ("/sys/fs/cgroup/memory", Group::v1)
        } else {
            continue;
        };
        // In a container the path may be the host's, which is not mounted here: its files are absent, the root's are not.
        groups.extend(
            Path::new(path.trim_start_matches('/')).ancestors().map(|below| group(Path::new(root).join(below))),
        );
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_files() {
        let text = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(field_kib(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(field_kib(text, "VmHWM:"), None);
        assert_eq!(field_kib("VmHWM:\t  12 kB\n", "VmHWM:"), Some(12 << 10));
        assert_eq!(field_kib("VmHWM:\t  x kB\n", "VmHWM:"), None);
        assert_eq!(field_kib("VmHWM:\t 18446744073709551615 kB\n", "VmHWM:"), None);
    }

    #[test]
    fn headroom_counts_cached_files_as_free() {
        let stat = "anon 500\nactive_file 100\ninactive_file 200\nfile 999\n";
        let cached = ["active_file", "inactive_file"];
        assert_eq!(headroom("1000\n", "800\n", stat, cached), Some(500));
        assert_eq!(headroom("1000\n", "800\n", "", cached), Some(200));
        assert_eq!(headroom("1000\n", "1800\n", "", cached), Some(0));
        assert_eq!(headroom("max\n", "800\n", stat, cached), None);
    }

    #[test]
    fn groups_and_all_that_enclose_them() {
        let folders =
            |text| group_folders(text).into_iter().map(|g| g.folder.display().to_string()).collect::<Vec<_>>();
        assert_eq!(folders("0::/\n"), ["/sys/fs/cgroup/"]);
        assert_eq!(folders("0::/a/b\n"), ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup/"]);
        assert_eq!(
            folders("5:cpu,cpuacct:/x\n4:memory:/docker\nnonsense\n"),
            ["/sys/fs/cgroup/memory/docker", "/sys/fs/cgroup/memory/"]
        );
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process() {
        let (available, peak) = (available().unwrap(), peak_resident().unwrap());
        assert!(available > 1 << 20, "{available}");
        assert!(peak > 1 << 20 && peak < 1 << 40, "{peak}");
    }
}
