//! `Rules` differences as kernel messages: nftables netlink batches, applied as one transaction.
