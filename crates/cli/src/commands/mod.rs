//! One module per subcommand: its options, and what it does.

pub(crate) mod doctor;
