//! Settings of libtorch that its C interface does not reach, through the C++ symbols of the one version that this crate links.

use std::ffi::c_void;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

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

/// Held for reading by passes that use operations without a reproducible algorithm, for writing while reproducible ones are demanded.
static DEMAND: RwLock<()> = RwLock::new(());

/// Chooses softmax attention that has a reproducible backward pass, for the whole process.
pub(crate) fn choose_reproducible_attention() {
    // SAFETY: the context is a static object of libtorch; the signatures are those of the pinned version.
    unsafe { set_cudnn_attention(global_context(), false) }
}

/// Runs `work` while libtorch must choose reproducible algorithms: above all the backward pass of attention, which otherwise adds with
/// atomics. An operation without such an algorithm fails.
pub(crate) fn reproducibly<T>(work: impl FnOnce() -> T) -> T {
    let _guard = DEMAND.write().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: as above; the flags are read when an operation is launched, and no other pass of this crate runs meanwhile.
    let set = |enabled: bool| unsafe {
        let context = global_context();
        set_fill_uninitialized(context, false);
        set_deterministic_algorithms(context, enabled, false);
    };
    set(true);
    let result = work();
    set(false);
    result
}

/// Holds off [`reproducibly`] while alive.
pub(crate) fn free_choice() -> RwLockReadGuard<'static, ()> {
    DEMAND.read().unwrap_or_else(PoisonError::into_inner)
}
