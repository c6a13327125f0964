//! Who asks. The only maker of a [`Caller`]; TLS and tokens will be checked here and nowhere else.

use std::fmt;

use crate::http::Request;

/// Who asks, and as what. Nothing outside this file can make one.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    actor: &'static str,
    role: Role,
}

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Everything.
    Admin,
}

/// Whoever reaches a listener is who runs this machine: a listener beyond loopback and Unix sockets refuses to start without
/// `--insecure-listen`, and then that is said at every start and in `/readyz`.
pub(super) fn identify(_request: &Request) -> Caller {
    Caller { actor: "local", role: Role::Admin }
}

/// For logs: `local (admin)`.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Admin => "admin",
        };
        write!(f, "{} ({role})", self.actor)
    }
}
