//! Drover's operator: it watches build requests and has them built by pods.
//!
//! Each look at a request has three steps, and a module for each: [`observe`] reads everything that matters into a
//! [`world::World`]; [`plan`] decides, and does nothing else; [`execute`] does what the plan says, and decides
//! nothing. [`queue`] knows what requests mean for each other and which of them may begin. [`session`] holds the
//! conversations with builders that plans start. [`controller`] wires it to the API server, [`sweep`] clears away what
//! lost its request. [`process`] decides when all that may run: while this process holds the [`lease`], on which every
//! write depends ([`gate`]). [`check`] is what the chart runs beside the operator. [`trace`] says what a request's life was made of,
//! to a collector if there is one.
//!
//! `lease::record`, `plan`, `status`, `world`, `pod`, `quantity`, `keys` and, but for its way out, `trace` are pure: no async runtime, no clock, no network, no environment.

pub mod backoff;
pub mod check;
pub mod class_file;
pub mod clock;
pub mod controller;
pub mod error;
pub mod events;
pub mod execute;
pub mod gate;
pub mod health;
pub mod http;
pub mod init;
pub mod keys;
pub mod lease;
pub mod log;
pub mod lookup;
pub mod metrics;
pub mod observe;
pub mod obstacle;
pub mod operator;
pub mod plan;
pub mod pod;
pub mod process;
pub mod quantity;
pub mod queue;
pub mod ready;
pub mod refusal;
pub mod scope;
pub mod secrets;
pub mod seed;
pub mod session;
pub mod settings;
pub mod status;
pub mod sweep;
pub mod trace;
pub mod watches;
pub mod world;
