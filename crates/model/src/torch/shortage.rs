//! What libtorch and the driver say when memory runs out, as numbers.

/// Texts that mean that memory ran out, on a GPU and on the host.
const MARKS: [&str; 3] = ["out of memory", "OUT_OF_MEMORY", "can't allocate memory"];
/// What stands before the size of the allocation that failed: the GPU's allocator, the host's, and ours for pinned memory.
const ASKED: [&str; 3] = ["Tried to allocate ", "you tried to allocate ", "pinned memory: "];
/// What stands before the bytes that the GPU had left.
const FREE: &str = " of which ";

/// An allocation that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub on_gpu: bool,
    /// Bytes beyond those that were free; 0 where the text does not say.
    pub missing: u64,
}

/// Reads an error's text; `None` if it is not about memory.
pub(crate) fn shortage(text: &str) -> Option<Shortage> {
    if !MARKS.iter().any(|mark| text.contains(mark)) {
        return None;
    }
    let asked = ASKED.iter().find_map(|mark| size(text.split_once(mark)?.1)).unwrap_or(0);
    let free = text.split_once(FREE).and_then(|(_, rest)| size(rest)).unwrap_or(0);
    let on_host = text.contains("can't allocate memory") || text.contains("pinned memory");
    // A request that would have fitted failed because what is free lies in pieces: as much is missing as was asked for.
    let missing = if free < asked { asked - free } else { asked };
    Some(Shortage { on_gpu: !on_host, missing })
}

/// `20.00 GiB`, `512.50 MiB`, `8 bytes` at the start of a text.
fn size(text: &str) -> Option<u64> {
    let mut words = text.split_ascii_whitespace();
    let number: f64 = words.next()?.parse().ok()?;
    let unit = match words.next()?.trim_end_matches(['.', ',', ':']) {
        "bytes" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    Some((number * (1u64 << unit) as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_of_both_allocators_and_of_pinned_memory_give_the_missing_bytes() {
        let gpu = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 12.50 GiB is free. Process 7 has 66.67 GiB memory in use.";
        assert_eq!(shortage(gpu), Some(Shortage { on_gpu: true, missing: 15 << 29 }));
        let pieces = "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 1.00 GiB is free.";
        assert_eq!(shortage(pieces), Some(Shortage { on_gpu: true, missing: 512 << 20 }));
        let host = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)";
        assert_eq!(shortage(host), Some(Shortage { on_gpu: false, missing: 8 << 30 }));
        let pinned = "out of memory: pinned memory: 4096 bytes: CUDA_ERROR_OUT_OF_MEMORY";
        assert_eq!(shortage(pinned), Some(Shortage { on_gpu: false, missing: 4096 }));
        assert_eq!(shortage("CUDA error: out of memory"), Some(Shortage { on_gpu: true, missing: 0 }));
        assert_eq!(shortage("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), None);
        assert_eq!(shortage("out of memory: Tried to allocate a lot"), Some(Shortage { on_gpu: true, missing: 0 }));
    }
}
