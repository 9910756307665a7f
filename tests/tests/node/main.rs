//! The `node` layer: in a real cluster. Run it by `cargo xtask test node`.

mod build;
mod chaos;
mod corpus;
mod docs;
mod ends;
mod fixtures;
mod helm;
mod images;
mod restart;
mod sandbox;
