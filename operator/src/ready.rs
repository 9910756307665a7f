//! Which watches have delivered their first list.
//!
//! kube's own `Store::wait_until_ready` wakes one waiter only (kube-runtime 5.0: `DelayedInit` keeps the last waker),
//! and here several tasks wait for the same store. This wakes them all.

use tokio::sync::watch;

/// One of the operator's watches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Watch {
    Classes = 1,
    Pods = 2,
    Requests = 4,
}

impl Watch {
    pub const ALL: [Self; 3] = [Self::Classes, Self::Pods, Self::Requests];

    /// Its place in [`Self::ALL`].
    pub fn index(self) -> usize {
        match self {
            Self::Classes => 0,
            Self::Pods => 1,
            Self::Requests => 2,
        }
    }

    /// For `/readyz`.
    pub fn check(self) -> &'static str {
        match self {
            Self::Classes => "watch-classes",
            Self::Pods => "watch-pods",
            Self::Requests => "watch-requests",
        }
    }

    /// For logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Classes => "classes",
            Self::Pods => "pods",
            Self::Requests => "requests",
        }
    }
}

/// Cheap to share by reference; starts with nothing seen.
#[derive(Debug)]
pub struct Ready(watch::Sender<u8>);

impl Ready {
    pub fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// The watch has delivered its first list, or another one.
    pub fn mark(&self, watch: Watch) {
        self.0.send_if_modified(|seen| {
            let before = *seen;
            *seen |= watch as u8;
            *seen != before
        });
    }

    /// Resolves as soon as all of these have.
    pub async fn wait(&self, watches: &[Watch]) {
        let wanted = watches.iter().fold(0, |bits, watch| bits | *watch as u8);
        // The sender is `self`: it outlives the wait.
        let _ = self.0.subscribe().wait_for(|seen| seen & wanted == wanted).await;
    }
}

impl Default for Ready {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn every_waiter_is_woken() {
        let ready = Arc::new(Ready::new());
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let ready = ready.clone();
                tokio::spawn(async move { ready.wait(&[Watch::Classes, Watch::Pods]).await })
            })
            .collect();
        tokio::task::yield_now().await;
        ready.mark(Watch::Pods);
        tokio::task::yield_now().await;
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
        ready.mark(Watch::Classes);
        for waiter in waiters {
            waiter.await.unwrap();
        }
        ready.wait(&[Watch::Pods]).await;
    }
}
