//! `checkpoint publish | fetch | plan | split | assemble`.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use daemon::Failure;
use fragments::CheckpointTree;
use protocol::documents::Release;
use protocol::envelope::{Expect, open_stored};
use protocol::{Digest, FileRecord};
use serde_json::json;
use storage::{PutCondition, StoreError, transfer};

use crate::office::{Office, unserved};

/// Publish a Hugging Face tree as a release that runs can start from
#[derive(Debug, clap::Args)]
pub struct PublishArgs {
    /// Folder with safetensors, config.json and quasar_parameter_contract.json
    #[arg(long, value_name = "DIR")]
    tree: PathBuf,
    /// Name of the release; default: from the digest of its files
    #[arg(long, value_name = "NAME")]
    release: Option<String>,
}

pub async fn publish(office: &Office, arguments: PublishArgs) -> Result<(), Failure> {
    CheckpointTree::open(&arguments.tree).map_err(Failure::configuration)?;
    let files = describe(&arguments.tree)?;
    let release = arguments.release.unwrap_or_else(|| format!("base-{}", files_digest(&files).short()));
    let document = Release { release: release.clone(), versions: Vec::new(), files, tokens: 0 };
    let manifest = upload(office, &arguments.tree, &document).await?;
    println!("published release {release} ({} files), manifest {manifest}", document.files.len());
    Ok(())
}

/// Records of all files of a tree, by name.
pub fn describe(tree: &Path) -> Result<Vec<FileRecord>, Failure> {
    let unreadable = |error: std::io::Error| Failure::configuration(anyhow::anyhow!("{}: {error}", tree.display()));
    let entries: Vec<_> = std::fs::read_dir(tree).and_then(Iterator::collect).map_err(unreadable)?;
    let mut names = Vec::new();
    // A name that is no text is that of no file of a release.
    for name in entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| is_part_of_release(name)) {
        // What a link leads to counts, and one that leads nowhere would be missing from the release.
        let path = tree.join(&name);
        let kind = std::fs::metadata(&path).map_err(|error| {
            Failure::configuration(anyhow::anyhow!("{}: {error}", path.display()))
                .hint("every file of the folder goes into the release: repair this one, or move it away")
        })?;
        if kind.is_file() {
            names.push(name);
        }
    }
    names.sort();
    names.into_iter().map(|name| FileRecord::of_file(name.clone(), &tree.join(name)).map_err(unreadable)).collect()
}

/// Whether a file of a tree goes into its release, by its name.
pub fn is_part_of_release(name: &str) -> bool {
    protocol::paths::is_valid(name) && !name.contains('/') && !name.ends_with(".qsr") && !name.starts_with('.')
}

pub fn files_digest(files: &[FileRecord]) -> Digest {
    Digest::blake3(&protocol::codec::encode(&files.to_vec()))
}

/// Uploads a tree, parts first, manifest last; what is there already is kept. Gives the digest of the manifest's file.
pub async fn upload(office: &Office, tree: &Path, release: &Release) -> Result<Digest, Failure> {
    for file in &release.files {
        let key = office.keys.release_file(&release.release, &file.path);
        let hint = "another checkpoint lies under this name; choose another one";
        office.upload_once(&key, file, &tree.join(&file.path), hint).await?;
    }
    let key = office.keys.release_manifest(&release.release);
    let bytes = office.sign(release, &office.context);
    match office.store.put(&key, Bytes::from(bytes.clone()), PutCondition::IfAbsent).await {
        Ok(_) => Ok(Digest::blake3(&bytes)),
        Err(StoreError::PreconditionFailed { .. }) => {
            let object = office.store.get(&key, 1 << 21).await.map_err(unserved)?;
            Ok(Digest::blake3(&object.bytes))
        }
        Err(error) => Err(unserved(error)),
    }
}

/// Download a release and check every byte of it
#[derive(Debug, clap::Args)]
pub struct FetchArgs {
    /// Name of the release
    #[arg(long, value_name = "NAME")]
    release: String,
    /// Folder to download to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub async fn fetch(office: &Office, arguments: FetchArgs) -> Result<(), Failure> {
    let (release, _) = fetch_to(office, &arguments.release, &arguments.out).await?;
    println!("fetched release {} to {}", release.release, arguments.out.display());
    Ok(())
}

/// Downloads a release, resuming what is there, and gives its manifest with the digest of the manifest's file.
pub async fn fetch_to(office: &Office, release: &str, out: &Path) -> Result<(Release, Digest), Failure> {
    let key = office.keys.release_manifest(release);
    let object = match office.store.get(&key, 1 << 21).await {
        Err(error @ StoreError::NotFound { .. }) => {
            return Err(Failure::configuration(error).hint("name a release that is published; `checkpoint publish` publishes one"));
        }
        result => result.map_err(unserved)?,
    };
    // Signed by this key, or by one before a rotation.
    let signers = super::run::roots(office).await.map_or_else(|_| vec![office.key()], |roots| roots.orchestrators.clone());
    let verified = open_stored::<Release>(&object.bytes, &office.context, Expect::Any(&signers)).map_err(Failure::configuration)?;
    std::fs::create_dir_all(out).map_err(|error| Failure::configuration(anyhow::anyhow!("{}: {error}", out.display())))?;
    for file in &verified.document.files {
        let dest = out.join(&file.path);
        if transfer::is_complete(file, &dest).unwrap_or(false) {
            continue;
        }
        let source = (office.store.clone(), office.keys.release_file(release, &file.path));
        transfer::download(&source, file, &dest).await.map_err(Failure::unavailable)?;
    }
    Ok((verified.document, Digest::blake3(&object.bytes)))
}

/// Show how a checkpoint is cut into fragments
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    #[arg(long, value_name = "P", default_value_t = 24)]
    fragments: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn plan(arguments: &PlanArgs) -> Result<(), Failure> {
    let tree = CheckpointTree::open(&arguments.checkpoint).map_err(Failure::configuration)?;
    let plan = fragments::plan(tree.contract(), arguments.fragments).map_err(Failure::configuration)?;
    if arguments.json {
        let fragments: Vec<_> = plan
            .fragments
            .iter()
            .enumerate()
            .map(|(id, slices)| {
                let slices: Vec<_> = slices
                    .iter()
                    .map(|slice| json!({"tensor": slice.tensor, "row_start": slice.row_start, "row_end": slice.row_end, "dtype": slice.dtype.name()}))
                    .collect();
                json!({"id": id, "bytes": fragments::plan::fragment_bytes(&plan.fragments[id]), "slices": slices})
            })
            .collect();
        println!("{}", json!({ "fragments": fragments }));
        return Ok(());
    }
    println!("plan {} of {} elements", plan.digest(), plan.total_elements());
    for (id, slices) in plan.fragments.iter().enumerate() {
        println!("fragment {id:>3}  {:>14} bytes  {:>4} slices", fragments::plan::fragment_bytes(slices), slices.len());
    }
    Ok(())
}

/// Cut a checkpoint into one safetensors file for each fragment
#[derive(Debug, clap::Args)]
pub struct SplitArgs {
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    #[arg(long, value_name = "P", default_value_t = 24)]
    fragments: usize,
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn split(arguments: &SplitArgs) -> Result<(), Failure> {
    let plan = fragments::checkpoint::split(&arguments.checkpoint, arguments.fragments, &arguments.out).map_err(Failure::configuration)?;
    println!("wrote {} fragments of plan {} to {}", plan.fragments.len(), plan.digest(), arguments.out.display());
    Ok(())
}

/// Put fragments and a base tree together to a checkpoint
#[derive(Debug, clap::Args)]
pub struct AssembleArgs {
    /// Tree that everything outside the fragments comes from
    #[arg(long, value_name = "DIR")]
    base: PathBuf,
    /// Folder that `checkpoint split` wrote
    #[arg(long, value_name = "DIR")]
    fragments: PathBuf,
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn assemble(arguments: &AssembleArgs) -> Result<(), Failure> {
    let assembled =
        fragments::checkpoint::assemble(&arguments.base, &arguments.fragments, &arguments.out).map_err(Failure::configuration)?;
    println!("assembled {} elements to {}", assembled.elements, arguments.out.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_described_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path();
        for name in ["model-00002.safetensors", "model-00001.safetensors", "head.qsr", ".cache"] {
            std::fs::write(tree.join(name), name).unwrap();
        }
        std::fs::create_dir(tree.join("folder")).unwrap();
        let names = || describe(tree).map(|files| files.into_iter().map(|file| file.path).collect::<Vec<_>>());
        assert_eq!(names().unwrap(), ["model-00001.safetensors", "model-00002.safetensors"]);
        std::os::unix::fs::symlink(tree.join("gone"), tree.join("model-00003.safetensors")).unwrap();
        let refused = names().unwrap_err().to_string();
        assert!(refused.contains("model-00003.safetensors") && refused.contains("\nhint: "), "{refused}");
    }
}
