//! Settings of libtorch that its C interface does not reach, through the C++ symbols of the one version that this crate links.

use std::ffi::c_void;

unsafe extern "C" {
    /// `at::globalContext()`
    #[link_name = "_ZN2at13globalContextEv"]
    fn global_context() -> *mut c_void;
    /// `at::Context::setDeterministicAlgorithms(bool enabled, bool warn_only)`
    #[link_name = "_ZN2at7Context26setDeterministicAlgorithmsEbb"]
    fn set_deterministic_algorithms(context: *mut c_void, enabled: bool, warn_only: bool);
    /// `at::Context::setDeterministicFillUninitializedMemory(bool)`
    #[link_name = "_ZN2at7Context39setDeterministicFillUninitializedMemoryEb"]
    fn set_fill_uninitialized(context: *mut c_void, enabled: bool);
    /// `at::Context::setSDPUseCuDNN(bool)`
    #[link_name = "_ZN2at7Context14setSDPUseCuDNNEb"]
    fn set_cudnn_attention(context: *mut c_void, enabled: bool);
}

/// Lets libtorch choose reproducible algorithms on a GPU, for the whole process: above all in the backward pass of attention, which
/// otherwise adds with atomics. An operation that has none fails. Call it before anything is computed there.
pub(crate) fn compute_reproducibly() {
    // SAFETY: the context is a static object of libtorch; the signatures are those of the pinned version.
    unsafe {
        let context = global_context();
        // What nobody has written yet is read by nobody.
        set_fill_uninitialized(context, false);
        set_deterministic_algorithms(context, true, false);
        // Its attention has no such form.
        set_cudnn_attention(context, false);
    }
}
