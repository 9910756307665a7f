//! Requests that need each other's outputs, sent one after the other: what an input's path is may be known only when that
//! is built.

use std::collections::BTreeMap;

use anyhow::Context as _;
use drover_api::BuildRequest;
use drover_nix::{OutputName, StoreDir, StorePath};

use super::Cluster;
use crate::exit::{self, Fault, Outcome};
use crate::order::Queue;
use crate::output;

/// Sends in turns what needs nothing that is not built, and waits for it. What needs something that failed is not sent.
pub(super) async fn in_order(cluster: &Cluster, queue: &mut Queue) -> Outcome {
    // How each item ended.
    let mut codes: BTreeMap<usize, u8> = BTreeMap::new();
    loop {
        let is_due = |index: &usize| {
            !codes.contains_key(index)
                && queue.items[*index].needs.iter().all(|need| codes.contains_key(need))
        };
        let turn: Vec<usize> = (0..queue.items.len()).filter(is_due).collect();
        if turn.is_empty() {
            break;
        }
        let mut sent = Vec::new();
        for index in turn {
            let broken = queue.items[index].needs.iter().find(|need| codes[*need] != exit::DONE);
            if let Some(broken) = broken {
                let (name, broken_name) = (queue.items[index].name(), queue.items[*broken].name());
                output::print_text(&format!("{name} not sent: it needs {broken_name}\n"))?;
                codes.insert(index, codes[broken]);
                continue;
            }
            if !queue.items[index].is_named {
                queue.resolve(index).map_err(Fault::Input)?;
            }
            sent.push((index, cluster.submit(&queue.items[index]).await?));
        }
        for (index, name) in sent {
            let code = cluster.wait_for_one(&name).await?;
            if code == exit::DONE {
                let outputs = outputs(&cluster.get(&name).await?).map_err(Fault::Infrastructure)?;
                queue.record(index, &outputs);
            }
            codes.insert(index, code);
        }
    }
    Ok(codes.into_values().max().unwrap_or(exit::DONE))
}

fn outputs(request: &BuildRequest) -> anyhow::Result<BTreeMap<OutputName, StorePath>> {
    let outputs = request.status.iter().flat_map(|status| &status.outputs);
    let outputs =
        outputs.map(|(name, output)| Ok((name.parse()?, StoreDir::default().parse(output.path.as_bytes())?)));
    outputs.collect::<Result<_, drover_nix::Error>>().context("status.outputs make no sense")
}
