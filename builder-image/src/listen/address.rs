//! Lists of addresses and networks, as `from=` and certificates' `source-address` have them. Pure; no names are looked
//! up, so a list with a host name in it is refused where it is read.

use std::net::IpAddr;

/// Addresses that a list takes in. Those behind a `!` are left out, whatever else is said of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Networks {
    included: Vec<Network>,
    excluded: Vec<Network>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Network {
    address: IpAddr,
    prefix: u32,
}

impl Networks {
    /// Parses `ADDRESS[/PREFIX]`, separated by commas. The error says which item is wrong.
    pub(super) fn parse(list: &str) -> Result<Self, String> {
        let mut networks = Self { included: Vec::new(), excluded: Vec::new() };
        for item in list.split(',') {
            let (side, text) = match item.strip_prefix('!') {
                Some(text) => (&mut networks.excluded, text),
                None => (&mut networks.included, item),
            };
            side.push(Network::parse(text).ok_or_else(|| {
                format!("{item:?} is neither an address nor a network (10.1.0.0/16); names and wildcards are not understood")
            })?);
        }
        Ok(networks)
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        // A listener on [::] sees IPv4 clients as mapped addresses.
        let address = address.to_canonical();
        let holds = |list: &[Network]| list.iter().any(|network| network.contains(address));
        holds(&self.included) && !holds(&self.excluded)
    }
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address.parse().ok()?, Some(prefix)),
            None => (text.parse().ok()?, None),
        };
        let prefix = match prefix {
            // No sign and no blank, which `parse` alone would let pass.
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok()?,
            Some(_) => return None,
            None => width(address),
        };
        let network = Self { address, prefix };
        // Bits beyond the prefix mean that one of the two is a mistake, and nobody can tell which.
        (prefix <= width(address) && masked(address, prefix) == bits(address)).then_some(network)
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && masked(address, self.prefix) == bits(self.address)
    }
}

/// Whose connections count as one stranger's: an IPv4 address, or the /64 that a single IPv6 host may choose from.
pub(super) fn neighbourhood(address: IpAddr) -> (bool, u128) {
    let address = address.to_canonical();
    (address.is_ipv4(), masked(address, 64.min(width(address))))
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address in the upper bits, so that a prefix means the same for both families.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
        IpAddr::V6(address) => u128::from(address),
    }
}

fn masked(address: IpAddr, prefix: u32) -> u128 {
    // A shift by all 128 bits is none at all to the processor.
    let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
    bits(address) & mask
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(list: &str, address: &str) -> bool {
        Networks::parse(list).unwrap().contains(address.parse().unwrap())
    }

    #[test]
    fn addresses_networks_and_exceptions() {
        assert!(holds("10.1.2.3", "10.1.2.3") && !holds("10.1.2.3", "10.1.2.4"));
        assert!(holds("192.0.2.0/24,10.0.0.0/8", "10.9.9.9") && !holds("10.0.0.0/8", "11.0.0.0"));
        assert!(holds("0.0.0.0/0", "203.0.113.9") && !holds("0.0.0.0/0", "2001:db8::1"));
        assert!(holds("2001:db8::/32", "2001:db8:1::1") && !holds("::/0", "10.0.0.1"));
        assert!(holds("10.0.0.0/8", "::ffff:10.0.0.1"));
        assert!(
            !holds("10.0.0.0/8,!10.1.0.0/16", "10.1.2.3") && holds("!10.1.0.0/16,10.0.0.0/8", "10.2.0.0")
        );
        assert!(!holds("!10.0.0.0/8", "192.0.2.1"), "an exception includes nothing");
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for list in [
            "",
            "host.example",
            "10.0.0.*",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "10.0.0.0/+8",
            "10.0.0.0/8, ::1",
            "!",
        ] {
            assert!(Networks::parse(list).is_err(), "{list:?}");
        }
    }

    #[test]
    fn a_host_with_many_addresses_is_one_stranger() {
        let of = |text: &str| neighbourhood(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
        assert_eq!(of("10.0.0.1"), of("::ffff:10.0.0.1"));
    }
}
