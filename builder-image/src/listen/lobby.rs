//! Who may wait to log in. Pure: it decides, and the caller closes connections.
//!
//! A full lobby turns nobody away: it drops the connection that has waited longest from the neighbourhood that has most
//! connections waiting. Who holds a key is through in milliseconds, so a stranger who opens connections and says nothing
//! only ever pushes out strangers; OpenSSH's `MaxStartups` drops by chance, and may hit the operator.

use std::collections::HashMap;
use std::net::IpAddr;

use super::address::neighbourhood;

/// Connections that have not logged in yet. `C` is what closes one.
pub(super) struct Lobby<C> {
    /// Oldest first.
    waiting: Vec<Guest<C>>,
    capacity: usize,
    next: u64,
}

struct Guest<C> {
    ticket: u64,
    from: (bool, u128),
    connection: C,
}

impl<C> Lobby<C> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { waiting: Vec::new(), capacity, next: 0 }
    }

    /// Lets a connection in. Its ticket for [`Self::leave`], and who has to go for it.
    pub(super) fn enter(&mut self, address: IpAddr, connection: C) -> (u64, Option<C>) {
        let ticket = self.next;
        self.next += 1;
        self.waiting.push(Guest { ticket, from: neighbourhood(address), connection });
        let dropped = (self.waiting.len() > self.capacity).then(|| self.oldest_of_the_most());
        (ticket, dropped.map(|index| self.waiting.remove(index).connection))
    }

    /// It has logged in, or is gone. Leaving twice is no matter.
    pub(super) fn leave(&mut self, ticket: u64) {
        self.waiting.retain(|guest| guest.ticket != ticket);
    }

    /// Of neighbourhoods that have equally many, the one whose oldest connection is the oldest.
    fn oldest_of_the_most(&self) -> usize {
        let mut counts = HashMap::new();
        for guest in &self.waiting {
            *counts.entry(guest.from).or_insert(0_usize) += 1;
        }
        let most = counts.values().copied().max().unwrap_or(0);
        self.waiting.iter().position(|guest| counts[&guest.from] == most).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: u8) -> IpAddr {
        [10, 0, 0, host].into()
    }

    #[test]
    fn the_oldest_goes_when_it_is_full() {
        let mut lobby = Lobby::new(2);
        assert_eq!(lobby.enter(address(1), 'a').1, None);
        let (b, nobody) = lobby.enter(address(1), 'b');
        assert_eq!(nobody, None);
        assert_eq!(lobby.enter(address(1), 'c').1, Some('a'));
        lobby.leave(b);
        lobby.leave(b);
        assert_eq!(lobby.enter(address(1), 'd').1, None);
        assert_eq!(lobby.enter(address(1), 'e').1, Some('c'));
    }

    #[test]
    fn who_fills_it_pushes_out_itself() {
        let mut lobby = Lobby::new(4);
        assert_eq!(lobby.enter(address(9), "the operator").1, None);
        let mut dropped = Vec::new();
        for _ in 0..1000 {
            dropped.extend(lobby.enter(address(1), "a stranger").1);
        }
        assert_eq!(dropped.len(), 997);
        assert!(dropped.iter().all(|who| *who == "a stranger"));
        // And nobody who comes later is turned away.
        assert_eq!(lobby.enter(address(2), "another").1, Some("a stranger"));
    }

    #[test]
    fn equal_numbers_go_by_age() {
        let mut lobby = Lobby::new(2);
        lobby.enter(address(1), 'a');
        lobby.enter(address(2), 'b');
        assert_eq!(lobby.enter(address(3), 'c').1, Some('a'));
    }
}
