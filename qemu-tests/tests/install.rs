//! `scripts/install` below a directory of its own.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use qemu_tests::daemon::binary;
use qemu_tests::host::WorkDir;
use qemu_tests::image::project;
use serde_json::Value;

fn install(dest: &Path, arguments: &[&str]) -> Output {
    Command::new(project().join("scripts/install"))
        .args(arguments)
        .env("DESTDIR", dest)
        .env("PREFIX", "/opt/pointwork")
        .env("POINTWORK_BIN_DIR", binary("pointworkd").unwrap().parent().unwrap())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn files(dest: &Path) -> BTreeSet<String> {
    let output = Command::new("find").arg(dest).args(["-type", "f", "-printf", "/%P %m\n"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_is_installed_is_removed() {
    let dir = WorkDir::new().unwrap();
    let dest = dir.path("root");
    assert!(!install(&dest, &["--remove"]).status.success(), "nothing is there to be removed");
    assert!(!install(&dest, &["--frobnicate"]).status.success());

    succeeds(&install(&dest, &[]));
    let expected = [
        "/etc/pointwork/pointwork.toml 644",
        "/etc/systemd/system/pointworkd.service 644",
        "/opt/pointwork/bin/pointwork 755",
        "/opt/pointwork/bin/pointworkd 755",
        "/opt/pointwork/share/pointwork/installed 644",
        "/opt/pointwork/share/qemu/vhost-user/99-pointwork.json 644",
    ];
    assert_eq!(files(&dest), BTreeSet::from(expected.map(str::to_owned)));
    let unit = std::fs::read_to_string(dest.join("etc/systemd/system/pointworkd.service")).unwrap();
    assert!(
        unit.contains("ExecStart=/opt/pointwork/bin/pointworkd --config /etc/pointwork/pointwork.toml\n"),
        "{unit}"
    );
    assert!(unit.contains(" exec /opt/pointwork/bin/pointwork nic reset --config "), "{unit}");
    assert!(!unit.contains("@PREFIX@"), "{unit}");

    // Again, over a configuration that has been edited.
    let config = dest.join("etc/pointwork/pointwork.toml");
    std::fs::write(&config, "# mine\n").unwrap();
    succeeds(&install(&dest, &[]));
    assert_eq!(std::fs::read_to_string(&config).unwrap(), "# mine\n");

    let foreign = dest.join("opt/pointwork/bin/other");
    std::fs::write(&foreign, "").unwrap();
    succeeds(&install(&dest, &["--remove"]));
    let left: BTreeSet<String> = files(&dest).iter().map(|line| line[..line.len() - 4].to_owned()).collect();
    assert_eq!(
        left,
        BTreeSet::from(["/etc/pointwork/pointwork.toml", "/opt/pointwork/bin/other"].map(str::to_owned))
    );
    std::fs::remove_file(foreign).unwrap();

    succeeds(&install(&dest, &[]));
    std::fs::create_dir_all(dest.join("var/lib/pointwork")).unwrap();
    std::fs::write(dest.join("var/lib/pointwork/state.json"), "{}").unwrap();
    succeeds(&install(&dest, &["--remove", "--purge"]));
    assert_eq!(files(&dest), BTreeSet::new());
}

/// Who looks for vhost-user programs finds ours, and what it says of itself (docs/interop/vhost-user.json of QEMU).
#[test]
fn the_program_is_described_and_says_what_it_can() {
    let dir = WorkDir::new().unwrap();
    let dest = dir.path("root");
    succeeds(&install(&dest, &[]));
    let path = "opt/pointwork/share/qemu/vhost-user/99-pointwork.json";
    let described: Value = serde_json::from_slice(&std::fs::read(dest.join(path)).unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    assert!(
        described
            .as_object()
            .unwrap()
            .keys()
            .all(|key| ["description", "type", "binary", "tags"].contains(&&**key))
    );
    let binary = text(&described["binary"]);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(dest.join(binary.strip_prefix('/').unwrap()));
        command.args(arguments).stdin(Stdio::null()).output().unwrap()
    };
    // All else is to be ignored, known or not.
    for arguments in [&["--print-capabilities"][..], &["--fd=3", "--print-capabilities", "--no-such-option"]]
    {
        let said = run(arguments);
        succeeds(&said);
        assert!(said.stderr.is_empty(), "{said:?}");
        let capabilities: Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(capabilities, serde_json::json!({ "type": described["type"] }));
    }
    for argument in ["--fd=3", "--socket-path=/nowhere"] {
        let refused = run(&[argument]);
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{refused:?}");
    }
}

/// Systemd understands every line of the unit, with and without what the manuals add for wires and NICs, and finds it contained.
#[test]
fn systemd_accepts_the_unit() {
    let dir = WorkDir::new().unwrap();
    let dest = dir.path("root");
    succeeds(&install(&dest, &[]));
    let installed = std::fs::read_to_string(dest.join("etc/systemd/system/pointworkd.service")).unwrap();
    // The program has to be where the unit says.
    let unit = installed.replace("=/opt", &format!("={}/opt", dest.display()));
    assert_ne!(unit, installed);
    let added = |manual: &str| {
        let manual = std::fs::read_to_string(project().join("docs").join(manual)).unwrap();
        manual.split("```ini\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap().to_owned()
    };
    for (name, text) in [
        ("plain", unit.clone()),
        ("wires", format!("{unit}\n{}", added("wire.md"))),
        ("nics", format!("{unit}\n{}", added("nic.md"))),
    ] {
        let file = dir.path(name).join("pointworkd.service");
        std::fs::create_dir(dir.path(name)).unwrap();
        std::fs::write(&file, text).unwrap();
        let analyze = |words: &[&str]| {
            let mut command = Command::new("systemd-analyze");
            command.args(words).arg(&file).stdin(Stdio::null()).output().unwrap()
        };
        let verified = analyze(&["verify", "--man=no"]);
        succeeds(&verified);
        assert_eq!(String::from_utf8_lossy(&verified.stderr), "", "{name}");
        // 10 is a service that may do all, 5 and less what systemd itself calls "OK" for one that runs as root.
        let scored = analyze(&["security", "--no-pager", "--offline=true", "--threshold=32"]);
        let said = String::from_utf8_lossy(&scored.stdout).into_owned();
        assert!(scored.status.success(), "{name}: {said}");
        println!("{name}: {}", said.lines().find(|line| line.contains("Overall exposure")).unwrap());
    }
}
