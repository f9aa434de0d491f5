//! A merge from its tape, and a release from the newest states.

use protocol::documents::{Contribution, FragmentManifest, MergeManifest, Release, ReleaseRef, Tape};
use protocol::{Digest, FileRecord, Reason, codec};

use super::super::tensors;
use super::Hands;

impl Hands {
    pub(super) async fn merge(&self, tape: Tape, rejected: Vec<Contribution>, previous: (Digest, u64)) -> (MergeManifest, Digest, u64) {
        let (fragment, version) = (tape.fragment, tape.base_version + 1);
        let mut manifest = MergeManifest::unmoved(&tape, previous.0, rejected);
        let mut keyframe_length = previous.1;
        let state = match tape.restores {
            Some(earlier) => {
                let state = self.state(fragment, earlier).await;
                self.world.watch.borrow_mut().restored(&self.world, &tape, state.is_some());
                state
            }
            None if tape.inputs.is_empty() => None,
            None => {
                let base = self.persist(|| self.state(fragment, tape.base_version)).await;
                for input in &tape.inputs {
                    let key = self.world.slot_keys((input.hotkey, input.slot)).own.payload(tape.t);
                    self.persist(|| async {
                        let bytes = self.world.get(self.id, &key, None).await.ok().flatten()?.bytes;
                        (Digest::blake3(&bytes) == input.payload).then_some(())
                    })
                    .await;
                }
                Some(tensors::merged(&base, &tape))
            }
        };
        let inputs = tape.inputs.iter().map(|input| Contribution { norm: 1, ..input.contribution(Reason::None) });
        manifest.contributions.extend(inputs);
        if state.is_none() {
            manifest.restores = None;
        }
        if let Some(state) = state {
            let keyframe = tensors::keyframe_bytes(fragment, version, &state);
            manifest.version = version;
            manifest.keyframe = Digest::blake3(&keyframe);
            manifest.state = Digest::blake3(&state.0);
            keyframe_length = keyframe.len() as u64;
            let key = self.world.run.state(fragment, version);
            self.persist(|| self.put_bytes_once(&key, tensors::state_bytes(&state))).await;
            let key = self.world.run.keyframe(fragment, version);
            let stored = self.persist(|| self.put_bytes_once(&key, keyframe.clone())).await;
            if stored != keyframe {
                self.world.watch.borrow_mut().violated(&self.world, "bit_identical", format!("fragment {fragment}, version {version}"));
            }
            let record = FileRecord::of_bytes(key, &keyframe);
            let file = FragmentManifest { fragment, version, t: tape.t, keyframe: record, delta: None, state: manifest.state };
            self.put_once(&self.world.run.fragment_manifest(fragment, version), &file).await;
        }
        manifest.contributions.sort_by_key(|contribution| (contribution.hotkey, contribution.slot));
        let bytes = self.put_once(&self.world.run.merge(tape.t), &manifest).await;
        let mut id = Digest::blake3(&bytes);
        if let Ok(stored) = self.world.open_office::<MergeManifest>(&bytes) {
            (manifest, id) = (stored.document, stored.id);
        }
        (manifest, id, keyframe_length)
    }

    /// The f32 state of a version, if it is kept.
    async fn state(&self, fragment: u16, version: u64) -> Option<Digest> {
        let bytes = self.get_present(&self.world.run.state(fragment, version)).await?;
        bytes.first_chunk::<32>().map(|state| Digest(*state))
    }

    pub(super) async fn release(&self, versions: Vec<u64>, tokens: u64) -> ReleaseRef {
        let name = format!("run-{}", Digest::derive("quasar/v1/release", &[&self.world.context.run.0, &codec::encode(&versions)]).short());
        for (fragment, version) in versions.iter().enumerate() {
            let key = self.world.run.state(fragment as u16, *version);
            self.persist(|| async { self.world.get(self.id, &key, None).await.ok().flatten().map(drop) }).await;
        }
        let release = Release { release: name.clone(), versions, files: Vec::new(), tokens };
        let key = self.world.keys.release_manifest(&name);
        let stored = self.persist(|| self.put_bytes_once(&key, self.sign_ours(&release, &self.world.context.without_run()))).await;
        ReleaseRef { release: name, manifest: Digest::blake3(&stored) }
    }
}
