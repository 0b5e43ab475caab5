//! Front-ends, each put through the same: rows of `docs/compatibility.md`. Of QEMU's, which take long, those in which it has the
//! socket; `scripts/test --matrix` runs all.

use anyhow::{Result, ensure};
use qemu_tests::image::project;
use qemu_tests::matrix::{Kind, Row, page, rows};

/// Runs all rows that are for it, and says how long each has taken.
fn run(is_wanted: impl Fn(&Row) -> bool) -> Result<()> {
    let rows: Vec<Row> = rows().into_iter().filter(is_wanted).collect();
    ensure!(!rows.is_empty());
    for row in rows {
        println!("{row}: {:?}", row.run()?);
    }
    Ok(())
}

#[test]
fn qemu_with_split_rings() -> Result<()> {
    run(|row| row.client && matches!(row.kind, Kind::Qemu { packed: false, .. }))
}

#[test]
fn qemu_with_packed_rings() -> Result<()> {
    run(|row| row.client && matches!(row.kind, Kind::Qemu { packed: true, in_order: false, .. }))
}

#[test]
fn qemu_with_packed_rings_and_a_device_that_offers_order() -> Result<()> {
    run(|row| row.client && matches!(row.kind, Kind::Qemu { packed: true, in_order: true, .. }))
}

#[test]
fn the_library_s_front_end() -> Result<()> {
    run(|row| matches!(row.kind, Kind::Library { .. }))
}

#[test]
fn virtio_user_connects() -> Result<()> {
    run(|row| matches!(row.kind, Kind::VirtioUser(_)) && !row.client)
}

#[test]
fn virtio_user_listens_and_has_two_queues() -> Result<()> {
    run(|row| matches!(row.kind, Kind::VirtioUser(_)) && row.client)
}

#[test]
fn the_documentation_lists_what_is_run() -> Result<()> {
    let text = std::fs::read_to_string(project().join("docs/compatibility.md"))?;
    let differences = page::differences(&text)?;
    ensure!(
        differences.is_empty(),
        "docs/compatibility.md is to be written anew (scripts/test --matrix): {differences:#?}"
    );
    Ok(())
}
