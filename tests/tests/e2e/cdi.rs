// SPDX-License-Identifier: Apache-2.0
//! CDI devices: what a specification on the host adds to a container.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bulkhead_proto::cri::{CdiDevice, ContainerConfig, ContainerState, KeyValue};
use bulkhead_tests::client::{assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use tonic::Code;

const SLEEP: [&str; 2] = ["sleep", "1000"];
/// `LIBRARY` is a directory of the host.
const SPECIFICATION: &str = r#"---
cdiVersion: 1.0.0
kind: tests.dev/thing
containerEdits:
  env: [THING=all, OVERRIDE=cdi]
devices:
  - name: files
    containerEdits:
      env: [FILES=yes]
      mounts:
        - hostPath: LIBRARY
          containerPath: /library
          options: [ro, nosuid, nodev, noexec, rbind, rprivate]
  - name: node
    containerEdits:
      additionalGids: [4242]
      deviceNodes:
        - path: /dev/thing
          hostPath: /dev/zero
          type: c
          major: 1
          minor: 5
          fileMode: 0640
          gid: 4242
          permissions: r
      hooks:
        - hookName: startContainer
          path: /bin/sh
          args: [sh, -c, 'cat > /tmp/state; (id -u; echo $HOOK; echo $THING) > /tmp/hook']
          env: [HOOK=ran]
          timeout: 40
  - name: broken
    containerEdits:
      hooks:
        - hookName: startContainer
          path: /bin/sh
          args: [sh, -c, 'echo no such thing >&2; exit 3']
  - name: hooked
    containerEdits:
      hooks:
        - hookName: createContainer
          path: /usr/bin/vendor-hook
  - name: foreign
    containerEdits:
      deviceNodes:
        - path: /dev/thing0
          type: c
          major: 195
"#;

fn with_devices(name: &str, image: &str, devices: &[&str]) -> ContainerConfig {
    let device = |name: &&str| CdiDevice {
        name: format!("tests.dev/thing={name}"),
    };
    ContainerConfig {
        cdi_devices: devices.iter().map(device).collect(),
        ..container(name, image, &SLEEP)
    }
}

/// A directory of the host with a file and a program.
fn library(path: &Path) {
    fs::create_dir(path).expect("make a directory");
    fs::write(path.join("file"), "of the host").expect("write a file");
    let tool = path.join("tool");
    fs::write(&tool, "#!/bin/sh\n").expect("write a program");
    fs::set_permissions(tool, fs::Permissions::from_mode(0o755)).expect("chmod");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_gets_of_its_cdi_devices_what_a_pod_can_have_and_the_rest_is_refused() {
    fs::create_dir_all("/var/lib/bulkhead").expect("make /var/lib/bulkhead");
    let host = tempfile::tempdir_in("/var/lib/bulkhead").expect("directory");
    library(&host.path().join("library"));
    let (etc, run) = (host.path().join("etc"), host.path().join("run"));
    let config = format!(
        "cdi.spec_dirs = [\"{}\", \"{}\"]\n",
        etc.display(),
        run.display()
    );
    let daemon = Daemon::start_with(Networking::Loopback, &config).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");

    // Directories and files may come later.
    let early = client
        .create(&pod, with_devices("early", &busybox, &["node"]))
        .await;
    let words = ["tests.dev/thing=node", &etc.display().to_string()];
    assert_fails(early, Code::NotFound, &words);
    let library = host.path().join("library").display().to_string();
    fs::create_dir(&run).expect("make a directory");
    fs::write(
        run.join("thing.yaml"),
        SPECIFICATION.replace("LIBRARY", &library),
    )
    .expect("write the specification");

    let mut config = with_devices("main", &busybox, &["node"]);
    config.annotations.extend([(
        "cdi.k8s.io/plugin_1".to_owned(),
        "tests.dev/thing=files,tests.dev/thing=node".to_owned(),
    )]);
    config.envs = vec![KeyValue {
        key: "OVERRIDE".into(),
        value: "cri".into(),
    }];
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let seen = client
        .shell(
            &id,
            "echo $THING $OVERRIDE $FILES; stat -c '%t:%T %a %g' /dev/thing; head -c 2 /dev/thing | wc -c; \
             id -G; cat /library/file; echo; cat /tmp/hook; \
             touch /library/new || echo read-only; /library/tool || echo $?",
        )
        .await;
    let lines: Vec<_> = seen.lines().collect();
    assert_eq!(
        lines,
        [
            "all cdi yes",
            "1:5 640 4242",
            "2",
            "0 4242",
            "of the host",
            "0",
            "ran",
            "",
            "read-only",
            "126",
        ]
    );
    let state = client.shell(&id, "cat /tmp/state").await;
    for part in [
        format!("\"id\":\"{id}\""),
        "\"status\":\"created\"".to_owned(),
        "\"pid\":1,".to_owned(),
        "\"io.kubernetes.cri.sandbox-name\":\"pod\"".to_owned(),
    ] {
        assert!(state.contains(&part), "{part}: {state}");
    }

    let config = with_devices("broken", &busybox, &["broken"]);
    let broken = client.create(&pod, config).await.expect("create");
    let error = client.start(&broken).await.expect_err("start must fail");
    assert!(error.message().contains("no such thing"), "{error:?}");
    let status = client.status(&broken).await.expect("status");
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "StartError")
    );
    let hook = "startContainer hook \"/bin/sh\": exit status: 3";
    assert!(status.message.contains(hook), "{}", status.message);

    for (device, code, word) in [
        (
            "hooked",
            Code::InvalidArgument,
            "createContainer /usr/bin/vendor-hook",
        ),
        ("foreign", Code::Unimplemented, "/dev/thing0"),
    ] {
        let refused = client
            .create(&pod, with_devices(device, &busybox, &[device]))
            .await;
        let name = format!("CDI device tests.dev/thing={device}: ");
        assert_fails(refused, code, &[&name, word]);
    }
    let mut config = container("unqualified", &busybox, &SLEEP);
    let annotation = ("cdi.k8s.io/plugin_1".to_owned(), "thing".to_owned());
    config.annotations.extend([annotation]);
    let unqualified = client.create(&pod, config).await;
    assert_fails(unqualified, Code::InvalidArgument, &["\"thing\""]);
    client.end_pod(&pod).await;
}
