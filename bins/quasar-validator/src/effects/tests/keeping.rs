//! Versions that are demanded, and what is kept of them.

use super::*;

/// A store that serves some files slowly and counts who reads them. The rest it leaves to another.
struct Slow {
    files: HashMap<String, Bytes>,
    rest: GrantClient,
    reads: AtomicUsize,
    reading: AtomicUsize,
    most: AtomicUsize,
}

type Answer<'f, T> = Pin<Box<dyn Future<Output = Result<T, GrantError>> + Send + 'f>>;

// Spelt as the trait's macro spells it.
impl GrantAccess for Slow {
    fn get<'s, 'g, 'f>(&'s self, grant: &'g GrantRequest, range: Option<(u64, u64)>, limit: u64) -> Answer<'f, Bytes>
    where
        's: 'f,
        'g: 'f,
        Self: 'f,
    {
        Box::pin(async move {
            let Some(file) = self.files.get(&grant.key) else { return self.rest.get(grant, range, limit).await };
            self.reads.fetch_add(1, Ordering::SeqCst);
            let reading = self.reading.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(reading, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(30)).await;
            self.reading.fetch_sub(1, Ordering::SeqCst);
            Ok(file.clone())
        })
    }

    fn put<'s, 'g, 'f>(&'s self, grant: &'g GrantRequest, bytes: Bytes) -> Answer<'f, PutOutcome>
    where
        's: 'f,
        'g: 'f,
        Self: 'f,
    {
        self.rest.put(grant, bytes)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demanded_versions_are_made_two_at_a_time_each_from_the_one_before_until_the_keeper_goes() {
    let published = Published::new(&Cheat::default()).await;
    let world = &published.world;
    let (mut files, mut refs) = (HashMap::new(), Vec::new());
    for fragment in 0..3_u16 {
        let mut replica = world.keyframes[usize::from(fragment)][0].clone();
        for version in 1..=3 {
            let base = KeyframeId { plan: world.plan.digest(), fragment: u32::from(fragment), version: version - 1 };
            let theta: Vec<f32> = replica.iter().map(|value| value + 0.01).collect();
            let frame = delta::write(&world.plan, &base, &replica, &theta).unwrap();
            refs.push(KeyframeRef { fragment, version, digest: Digest::blake3(&frame.keyframe) });
            files.insert(published.run.delta(fragment, version), Bytes::from(frame.bytes));
            replica = frame.replica;
        }
    }
    published.publish_standing(2, &files.keys().cloned().collect::<Vec<_>>()).await;
    let slow = Slow {
        files,
        rest: GrantClient::new(published.hosts.clone()).unwrap(),
        reads: AtomicUsize::new(0),
        reading: AtomicUsize::new(0),
        most: AtomicUsize::new(0),
    };
    let (slow, reader, hotkey) = (Arc::new(slow), published.reader().await, published.hotkey.clone());
    let mut facts = RunFacts::clone(reader.facts());
    facts.manifest.parameters.codec_down = Codec::Int4;
    let (facts, state) = (Arc::new(facts), published.state.path());
    let proofs = Arc::new(Proofs { folder: state.to_owned(), context: facts.context, finder: hotkey.clone() });
    let reader = Arc::new(tokio::sync::Mutex::new(reader));
    let grants = Arc::new(Grants::new(reader, facts.clone(), slow.clone(), hotkey.account(), hotkey.sealing_secret(), proofs));
    let base = Arc::new(BaseTree::new(facts.clone(), grants.clone(), &state.join("checkpoints")));
    let folder = state.join("kept");
    let keyframes = Arc::new(Keyframes::new(facts, grants, base, folder.clone()));

    let keeper = keyframes.keeper();
    refs.iter().for_each(|one| keyframes.demand(*one, 0, true));
    // An audit asks beside that.
    assert!(keyframes.values(2, 1).await.is_ok());
    until(|| names_in(&folder).iter().filter(|name| name.ends_with(".safetensors")).count() == refs.len()).await;
    let count = |of: &AtomicUsize| of.load(Ordering::SeqCst);
    assert_eq!(count(&slow.reads), refs.len(), "no frame is read twice");
    assert!(count(&slow.most) <= 2, "{} at a time", count(&slow.most));

    drop(keeper);
    std::fs::remove_file(folder.join("0-1.safetensors")).unwrap();
    keyframes.demand(refs[0], 0, true);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(count(&slow.reads), refs.len(), "nobody works any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_on_disk_from_before_a_pause_goes_at_the_start_or_with_the_first_demand() {
    let published = Published::new(&Cheat::default()).await;
    let folder = published.state.path().join("runs").join(published.world.context.run.to_string());
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["1-2.safetensors", "1-30.safetensors", "1-31.safetensors.9.tmp", "2-2.safetensors"] {
        std::fs::write(folder.join(name), b"").unwrap();
    }
    let effects = published.effects(broken()).await;
    assert_eq!(names_in(&folder), ["1-2.safetensors", "1-30.safetensors", "2-2.safetensors"]);
    // Room is made also where the version itself cannot be had.
    effects.keyframes.demand(KeyframeRef { fragment: 1, version: 37, digest: Digest::ZERO }, 30, true);
    until(|| names_in(&folder) == ["1-30.safetensors", "2-2.safetensors"]).await;
}
