//! What the host has free.

use std::path::Path;

/// Bytes of the host's memory that this process can take.
pub fn free_memory() -> u64 {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let free = available(&text("/proc/meminfo")).unwrap_or_default();
    // In a container the machine's memory is more than what this process gets.
    let limit = limit(Path::new("/sys/fs/cgroup"), &text("/proc/self/cgroup")).unwrap_or(u64::MAX);
    free.min(limit)
}

/// The tightest memory limit of the control groups in a text of `/proc/self/cgroup`, of version 2 or 1, and of those above them; `None`
/// without a limit. Inside a container the group's own path may not be there, but the root is the container's.
fn limit(root: &Path, groups: &str) -> Option<u64> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        let files = Path::new(group.trim_start_matches('/')).ancestors().map(|group| root.join(group).join(file));
        // A group without a limit says `max`, or a number above any memory.
        limits.extend(files.filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok()));
    }
    limits.into_iter().min()
}

/// Bytes of memory that can be taken, from the text of `/proc/meminfo`.
fn available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_of_the_control_groups_counts() {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let of = |groups: &str| limit(folder.path(), groups);
        assert_eq!(of("0::/\n"), None);
        put("memory.max", "max\n");
        assert_eq!(of("0::/\n"), None, "no limit");
        put("a/b/memory.max", "max\n");
        put("a/memory.max", "4096\n");
        assert_eq!(of("0::/a/b\n"), Some(4096), "the group above");
        put("a/b/memory.max", "1024\n");
        assert_eq!(of("0::/a/b\n"), Some(1024));
        assert_eq!(of("0::/elsewhere\n"), None);
        put("memory/memory.limit_in_bytes", "2048\n");
        assert_eq!(of("9:name=systemd:/\n4:memory:/docker/c\n0::/\n"), Some(2048), "version 1, with the host's path in a container");
        assert_eq!(of("4:cpu,memory:/\n0::/a/b\n"), Some(1024), "both");
        assert_eq!(of(""), None);
    }

    #[test]
    fn free_memory_is_read_in_bytes() {
        assert_eq!(available("MemTotal: 10 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 10 kB\n"), None);
    }
}
