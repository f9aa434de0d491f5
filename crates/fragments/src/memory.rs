//! Memory for long results.

/// `count` zeros. Where the kernel has large pages they come in such, which saves a merge a tenth of its time: a page fault for
/// each 4 KiB costs as much as filling them.
pub(crate) fn zeros(count: usize) -> Vec<f32> {
    let values = vec![0.0; count];
    #[cfg(target_os = "linux")]
    {
        const PAGE_BYTES: usize = 4096;
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        if let Some(pages) = bytes.get(start..).filter(|pages| pages.len() >= PAGE_BYTES) {
            // SAFETY: the range lies within one allocation of ours, and the advice changes no content.
            // A refusal costs time and nothing else.
            let _ = unsafe { libc::madvise(pages.as_ptr().cast_mut().cast(), pages.len(), libc::MADV_HUGEPAGE) };
        }
    }
    values
}
