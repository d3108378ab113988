// SPDX-License-Identifier: Apache-2.0
//! The table of steps. A new one is one line here, and [`crate::around`] or [`crate::within`] where it is done.

/// Makes the enum and the list of its variants from one table, so that none is missing in the list.
macro_rules! steps {
    ($($(#[$comment:meta])* $name:ident),* $(,)?) => {
        /// What the daemon takes, gives back or records.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[$comment])* $name),* }

        impl Step {
            /// All steps.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

steps! {
    /// Any change of the records of pods, containers, images and leases.
    CommitRecords,

    // --- a pod
    MakeDirectory,
    MakeScratch,
    WriteNetworkRecord,
    NameNetworkRecord,
    MakeNetns,
    AddCni,
    JoinTap,
    SpawnVmm,
    MakeCgroup,
    ConfigureVmm,
    HearAgent,
    ConfigureGuest,
    LimitGuest,
    /// The guest and its VM, when a pod stops.
    EndGuest,
    KillProcess,
    RemoveCgroup,
    DeleteCni,
    RemoveNetns,
    RemoveNetworkRecord,
    RemoveDirectory,

    // --- a container
    GrowGuest,
    LeaseImage,
    AttachLayer,
    OpenBlockDevices,
    AttachVolume,
    DetachVolume,
    MakeEmptyDirDisk,
    MakeVolume,
    RemoveVolume,
    SyncMirror,
    SpawnFileServer,
    ServeFiles,
    AttachShare,
    DetachShare,
    CreateContainer,
    StartContainer,
    SignalContainer,
    OpenLog,
    UpdateContainer,
    RemoveContainer,
    ReleaseImage,

    // --- commands in a container, and all that flows to and from it
    Exec,
    OpenStream,

    // --- an image
    ReadManifest,
    ReadConfiguration,
    MakeLayerFile,
    ConvertLayer,
    NameLayer,
    NameSource,
    CollectLayers,

    // --- the start of a daemon
    SweepLeases,
    SweepStrays,
    AdoptPod,
    SweepNetworks,
}
