#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quasar_fragments_fuzz::index(bytes));
