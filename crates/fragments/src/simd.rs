//! Vector code without a second implementation: a loop is written once and compiled for several instruction sets; the
//! widest that the processor has is taken when the program runs.
//!
//! Rust neither reorders floating-point sums nor fuses multiplications into additions by itself, so all versions of a loop give the
//! same bits. Sums that shall use vector registers are therefore written with a fixed number of interleaved partial sums. Where a
//! loop asks for a fused multiplication, processors without one compute the same bits in software, slowly.

/// Defines a function whose body is compiled for AVX-512, for AVX2, and for what the target always has.
macro_rules! vectorised {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $output:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name($($argument: $type),*) $(-> $output)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $output)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($argument: $type),*) $(-> $output)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) $(-> $output)? {
                    body($($argument),*)
                }
                match $crate::simd::level() {
                    // SAFETY: the processor has what the level says.
                    $crate::simd::Level::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: as above.
                    $crate::simd::Level::Avx2 => return unsafe { avx2($($argument),*) },
                    $crate::simd::Level::Baseline => {}
                }
            }
            body($($argument),*)
        }
    };
}

pub(crate) use vectorised;

/// The instruction sets that are told apart.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Baseline,
    Avx2,
    Avx512,
}

/// The widest instruction set of this processor.
#[cfg(target_arch = "x86_64")]
pub(crate) fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = tests::FORCED.get() {
        return level;
    }
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if wide {
        Level::Avx512
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        Level::Avx2
    } else {
        Level::Baseline
    }
}

/// Runs `work` on this thread with every instruction set that the processor has.
#[cfg(test)]
pub(crate) fn with_each_level<T>(work: impl Fn() -> T) -> Vec<T> {
    #[cfg(target_arch = "x86_64")]
    {
        let widest = level();
        let levels = [Level::Baseline, Level::Avx2, Level::Avx512].into_iter().filter(|level| *level as u8 <= widest as u8);
        levels
            .map(|level| {
                tests::FORCED.set(Some(level));
                let result = work();
                tests::FORCED.set(None);
                result
            })
            .collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    vec![work()]
}

#[cfg(test)]
mod tests {
    #[cfg(target_arch = "x86_64")]
    thread_local! {
        pub(super) static FORCED: std::cell::Cell<Option<super::Level>> = const { std::cell::Cell::new(None) };
    }
}
