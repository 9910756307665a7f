//! The `control-plane` layer: against a real etcd and kube-apiserver. Run it by `cargo xtask test control-plane`.

mod by_path;
mod chart;
mod chart_crds;
mod command_line;
mod corpus;
mod crd;
mod deletion;
mod docs;
mod double;
mod fixtures;
mod lease;
mod ledger;
mod monitoring;
mod operator;
mod outages;
mod play;
mod poison;
mod process;
mod rights;
mod signals;
mod tools;
mod waiting;
mod world;
mod writes;
