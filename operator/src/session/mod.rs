pub mod host_key;
pub mod ssh;
