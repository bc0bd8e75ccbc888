//! Reasons of events: those of upstream's kubelet 1.37 (`pkg/kubelet/events/event.go`, and what it writes out elsewhere), each of
//! which is sent or is not for a reason.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};

/// Upstream's reasons, in its order.
const OF_UPSTREAM: &str = "Created Started Failed Killing Preempting BackOff ExceededGracePeriod FailedKillPod \
    FailedCreatePodContainer NetworkNotReady ResizeDeferred ResizeInfeasible ResizeCompleted ResizeStarted ResizeError \
    FailedNodeDeclaredFeaturesCheck Pulling Pulled InspectFailed ErrImageNeverPull NodeReady NodeNotReady NodeSchedulable \
    NodeNotSchedulable Starting KubeletSetupFailed FailedAttachVolume FailedMount VolumeResizeFailed VolumeResizeSuccessful \
    FileSystemResizeFailed VolumePermissionChangeInProgress FileSystemResizeSuccessful FailedMapVolume AlreadyMountedVolume \
    SuccessfulAttachVolume SuccessfulMountVolume Rebooted Shutdown ContainerGCFailed ImageGCFailed \
    FailedNodeAllocatableEnforcement NodeAllocatableEnforced SandboxChanged FailedCreatePodSandBox FailedPodSandBoxStatus \
    FailedMountOnFilesystemMismatch FailedPrepareDynamicResources PossibleMemoryBackedVolumesOnDisk CgroupV1 InvalidImageID \
    InvalidDiskCapacity FreeDiskSpaceFailed Unhealthy ProbeWarning FailedSync FailedValidation FailedPostStartHook \
    FailedPreStopHook NodeHasInsufficientMemory NodeHasSufficientMemory NodeHasDiskPressure NodeHasNoDiskPressure \
    NodeHasInsufficientPID NodeHasSufficientPID EvictionThresholdMet Evicted DNSConfigForming MissingClusterDNS \
    CheckLimitsForResolvConf FailedToRetrieveImagePullSecret HostIPsIPFamilyMismatch LifecycleHTTPFallback \
    CertificateOverdueForRefresh CertificateExpired SystemOOM";

/// Those that are not sent, and why.
const NOT_SENT: [(&str, &str); 27] = [
    ("AlreadyMountedVolume", "whether others have a local volume with another group is not looked at"),
    ("CertificateExpired", "a certificate that cannot be renewed is FailedMount"),
    ("CertificateOverdueForRefresh", "a certificate that cannot be renewed is FailedMount"),
    ("CheckLimitsForResolvConf", "whose pod has less than its resolver settings want, it tells: DNSConfigForming"),
    ("ContainerGCFailed", "there is no collector of containers: a worker removes its own"),
    ("FailedAttachVolume", "the attach/detach controller attaches, and tells"),
    ("FailedCreatePodContainer", "a pod's group is made with its sandbox: FailedCreatePodSandBox"),
    ("FailedMapVolume", "a device that cannot be had is FailedMount"),
    ("FailedMountOnFilesystemMismatch", "a device that is wanted as a file system is FailedMount"),
    ("FailedNodeAllocatableEnforcement", "the node does not start then"),
    ("FailedNodeDeclaredFeaturesCheck", "the API server asks before it lets a pod change"),
    ("FailedPodSandBoxStatus", "a sandbox that is made tells its addresses with that"),
    ("FailedSync", "each step tells by itself what failed"),
    ("FailedValidation", "a file with a fault is told of in the log, by its line: there is no pod to tell of"),
    ("FileSystemResizeFailed", "a volume that cannot grow is FailedMount"),
    ("HostIPsIPFamilyMismatch", "pods have addresses of the families that their network has"),
    ("InvalidDiskCapacity", "a disk without a capacity is not measured"),
    ("InvalidImageID", "an image that cannot be removed is told of in the log, by its id"),
    ("KubeletSetupFailed", "a daemon that cannot start ends with the reason, before it knows its node"),
    ("LifecycleHTTPFallback", "a hook that is to be asked by TLS is asked by nothing else"),
    ("NetworkNotReady", "a sandbox without its network is FailedCreatePodSandBox"),
    ("PossibleMemoryBackedVolumesOnDisk", "volumes in memory are mounted with noswap, where the kernel has it"),
    ("SuccessfulAttachVolume", "the attach/detach controller attaches, and tells"),
    ("SuccessfulMountVolume", "the start of a container shows that its volumes are mounted"),
    ("VolumePermissionChangeInProgress", "giving a volume to a group is not told of while it goes on"),
    ("VolumeResizeFailed", "a volume that cannot grow is FailedMount"),
    ("VolumeResizeSuccessful", "the controller of the driver tells"),
];

/// All that the crates say which decide about events.
fn sources() -> String {
    fn read(dir: &Path, text: &mut String) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                read(&path, text);
            } else {
                // What tests say is not sent.
                let source = fs::read_to_string(&path).unwrap();
                text.push_str(source.split("#[cfg(test)]").next().unwrap());
            }
        }
    }
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    for dir in ["src", "../pod/src", "../orlop/src/node"] {
        read(&own.join(dir), &mut text);
    }
    text
}

#[test]
fn every_reason_of_upstream_is_sent_or_not_for_a_reason() {
    let sources = sources();
    let upstream: Vec<&str> = OF_UPSTREAM.split_whitespace().collect();
    for reason in &upstream {
        let is_sent = sources.contains(&format!("\"{reason}\""));
        let excused = NOT_SENT.iter().find(|(name, _)| name == reason);
        assert!(is_sent != excused.is_some(), "{reason}: sent {is_sent}, not for a reason: {excused:?}");
    }
    for (name, why) in NOT_SENT {
        assert!(upstream.contains(&name) && !why.is_empty(), "{name}");
    }
}
