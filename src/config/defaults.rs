//! Where daemons listen when nobody says: as macros, so that help texts can quote it.

/// Where an agent listens.
macro_rules! agent_listen {
    () => {
        "127.0.0.1:9000"
    };
}

/// Where a control plane listens.
macro_rules! control_plane_listen {
    () => {
        "127.0.0.1:8080"
    };
}

pub(crate) use {agent_listen, control_plane_listen};
