/// The Envoy admin port.
pub const DEFAULT_ADMIN_PORT: u16 = 19_000;
/// x
#[derive(Debug)]
pub struct Bootstrap;
