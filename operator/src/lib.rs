//! Drover's operator: it watches build requests and has them built by pods.
pub mod error;
pub mod http;
pub mod init;
pub mod keys;
pub mod metrics;
pub mod plan;
pub mod pod;
pub mod session;
pub mod settings;
pub mod status;
pub mod world;
