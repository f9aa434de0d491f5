//! A single-threaded executor on a virtual clock: the same tasks in the same order, every time.
//!
//! Time moves only when nothing can run; it jumps to the next timer. Timers of the same millisecond fire in the order in which
//! they were set. Every task belongs to a *life* (one run of one process); a crash drops all tasks of a life where they stand, and a
//! life that is stopped does nothing until it goes on, when all that was due meanwhile happens at once.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// One run of one process.
pub type Life = u64;
/// The life of the world itself, which never ends.
pub const WORLD: Life = 0;

/// A handle on the executor; clones share it.
#[derive(Clone, Default)]
pub struct Executor(Rc<Inner>);

#[derive(Default)]
struct Inner {
    now_ms: Cell<u64>,
    order: Cell<u64>,
    lives: Cell<Life>,
    ended: RefCell<BTreeSet<Life>>,
    /// Lives that stand still, with what is to happen in them since.
    stopped: RefCell<BTreeMap<Life, Vec<Due>>>,
    timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    ready: Arc<Mutex<VecDeque<Arc<Signal>>>>,
}

struct Task {
    life: Life,
    /// `None` while it is polled.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    signal: Arc<Signal>,
}

/// What wakes a task: its place in the table, and the queue to put it into.
struct Signal {
    place: usize,
    is_queued: AtomicBool,
    queue: Arc<Mutex<VecDeque<Arc<Self>>>>,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::Relaxed) {
            let queue = self.queue.clone();
            queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(self);
        }
    }
}

struct Timer {
    at_ms: u64,
    order: u64,
    what: What,
}

/// What a life that stands still has to catch up on.
enum Due {
    Poll(Arc<Signal>),
    Call(Box<dyn FnOnce()>),
}

enum What {
    Wake(Waker),
    Call(Life, Box<dyn FnOnce()>),
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at_ms, self.order) == (other.at_ms, other.order)
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ms, self.order).cmp(&(other.at_ms, other.order))
    }
}

impl Executor {
    /// Milliseconds since the beginning of this world.
    pub fn now_ms(&self) -> u64 {
        self.0.now_ms.get()
    }

    /// A process begins.
    pub fn new_life(&self) -> Life {
        self.0.lives.set(self.0.lives.get() + 1);
        self.0.lives.get()
    }

    /// A process ends where it stands: its tasks are dropped, its timers never fire.
    pub fn end(&self, life: Life) {
        self.0.ended.borrow_mut().insert(life);
        let missed = self.0.stopped.borrow_mut().remove(&life);
        // A future may own handles whose destructors look at the table.
        let mut dropped = Vec::new();
        for (place, entry) in self.0.tasks.borrow_mut().iter_mut().enumerate() {
            if entry.as_ref().is_some_and(|task| task.life == life && task.future.is_some()) {
                dropped.push(entry.take());
                self.0.free.borrow_mut().push(place);
            }
        }
        drop(missed);
    }

    /// A process stands still where it is: nothing of it happens until it goes on.
    pub fn stop(&self, life: Life) {
        self.0.stopped.borrow_mut().entry(life).or_default();
    }

    pub fn is_stopped(&self, life: Life) -> bool {
        self.0.stopped.borrow().contains_key(&life)
    }

    /// A process that stood still goes on, and finds everything that was due meanwhile.
    pub fn go_on(&self, life: Life) {
        let Some(missed) = self.0.stopped.borrow_mut().remove(&life) else { return };
        for due in missed {
            match due {
                Due::Poll(signal) => self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).push_back(signal),
                Due::Call(what) => self.after_boxed(0, life, what),
            }
        }
    }

    pub fn is_over(&self, life: Life) -> bool {
        self.0.ended.borrow().contains(&life)
    }

    /// Forgets everything that was to happen.
    pub fn clear(&self) {
        let timers = std::mem::take(&mut *self.0.timers.borrow_mut());
        let tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
        self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).clear();
        drop((timers, tasks));
    }

    fn next_order(&self) -> u64 {
        self.0.order.set(self.0.order.get() + 1);
        self.0.order.get()
    }

    /// Calls `what` after so long, unless the life is over by then.
    pub fn after(&self, delay_ms: u64, life: Life, what: impl FnOnce() + 'static) {
        self.after_boxed(delay_ms, life, Box::new(what));
    }

    fn after_boxed(&self, delay_ms: u64, life: Life, what: Box<dyn FnOnce()>) {
        let timer = Timer { at_ms: self.now_ms() + delay_ms, order: self.next_order(), what: What::Call(life, what) };
        self.0.timers.borrow_mut().push(Reverse(timer));
    }

    /// A future that is ready after so long.
    pub fn sleep(&self, delay_ms: u64) -> Sleep {
        Sleep { executor: self.clone(), at_ms: self.now_ms() + delay_ms, is_set: false }
    }

    /// Runs `future` as a task of `life`.
    pub fn spawn(&self, life: Life, future: impl Future<Output = ()> + 'static) {
        let mut tasks = self.0.tasks.borrow_mut();
        let place = self.0.free.borrow_mut().pop().unwrap_or_else(|| {
            tasks.push(None);
            tasks.len() - 1
        });
        let signal = Arc::new(Signal { place, is_queued: AtomicBool::new(false), queue: self.0.ready.clone() });
        tasks[place] = Some(Task { life, future: Some(Box::pin(future)), signal: signal.clone() });
        drop(tasks);
        signal.wake();
    }

    /// Runs everything that is ready, then jumps to the next timer. `false` when nothing is left to happen.
    pub fn turn(&self) -> bool {
        loop {
            let next = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match next {
                Some(signal) => self.poll(&signal),
                None => break,
            }
        }
        let Some(Reverse(timer)) = self.0.timers.borrow_mut().pop() else { return false };
        self.0.now_ms.set(timer.at_ms.max(self.now_ms()));
        match timer.what {
            What::Wake(waker) => waker.wake(),
            What::Call(life, _) if self.is_over(life) => {}
            What::Call(life, what) => {
                if let Some(what) = self.unless_stopped(life, what) {
                    what();
                }
            }
        }
        true
    }

    /// What is to be done now; a life that stands still does it later.
    fn unless_stopped(&self, life: Life, what: Box<dyn FnOnce()>) -> Option<Box<dyn FnOnce()>> {
        match self.0.stopped.borrow_mut().get_mut(&life) {
            Some(missed) => {
                missed.push(Due::Call(what));
                None
            }
            None => Some(what),
        }
    }

    fn poll(&self, signal: &Arc<Signal>) {
        if let Some(life) =
            self.0.tasks.borrow()[signal.place].as_ref().filter(|task| Arc::ptr_eq(&task.signal, signal)).map(|task| task.life)
            && let Some(missed) = self.0.stopped.borrow_mut().get_mut(&life)
        {
            // It counts as queued, so that it is woken once.
            return missed.push(Due::Poll(signal.clone()));
        }
        signal.is_queued.store(false, Ordering::Relaxed);
        let place = signal.place;
        let future = match &mut self.0.tasks.borrow_mut()[place] {
            // The place may belong to a later task by now.
            Some(task) if Arc::ptr_eq(&task.signal, signal) => task.future.take(),
            _ => None,
        };
        let Some(mut future) = future else { return };
        let waker = Waker::from(signal.clone());
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
        let life = self.0.tasks.borrow()[place].as_ref().map_or(WORLD, |task| task.life);
        let finished = match polled {
            Poll::Pending if !self.is_over(life) => {
                if let Some(task) = &mut self.0.tasks.borrow_mut()[place] {
                    task.future = Some(future);
                }
                None
            }
            _ => {
                self.0.free.borrow_mut().push(place);
                self.0.tasks.borrow_mut()[place].take()
            }
        };
        drop(finished);
    }
}

/// See [`Executor::sleep`].
pub struct Sleep {
    executor: Executor,
    at_ms: u64,
    is_set: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.executor.now_ms() >= self.at_ms {
            return Poll::Ready(());
        }
        if !self.is_set {
            self.is_set = true;
            let timer = Timer { at_ms: self.at_ms, order: self.executor.next_order(), what: What::Wake(context.waker().clone()) };
            self.executor.0.timers.borrow_mut().push(Reverse(timer));
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_wake_in_the_order_of_time_and_a_life_that_ends_does_nothing_more() {
        let executor = Executor::default();
        let told = Rc::new(RefCell::new(Vec::new()));
        let doomed = executor.new_life();
        for (life, delay_ms) in [(WORLD, 30), (WORLD, 10), (doomed, 20), (doomed, 5)] {
            let (inner, told) = (executor.clone(), told.clone());
            executor.spawn(life, async move {
                inner.sleep(delay_ms).await;
                told.borrow_mut().push((inner.now_ms(), delay_ms));
            });
        }
        let inner = executor.clone();
        executor.after(15, WORLD, move || inner.end(doomed));
        let other = told.clone();
        executor.after(16, doomed, move || other.borrow_mut().push((0, 0)));
        while executor.turn() {}
        assert_eq!(*told.borrow(), [(5, 5), (10, 10), (30, 30)]);
    }

    #[test]
    fn a_life_that_stands_still_catches_up_in_order_once_it_goes_on() {
        let executor = Executor::default();
        let told = Rc::new(RefCell::new(Vec::new()));
        let life = executor.new_life();
        for delay_ms in [10, 40] {
            let (inner, told) = (executor.clone(), told.clone());
            executor.spawn(life, async move {
                inner.sleep(delay_ms).await;
                told.borrow_mut().push((inner.now_ms(), delay_ms));
            });
        }
        let (inner, other) = (executor.clone(), told.clone());
        executor.after(20, life, move || other.borrow_mut().push((inner.now_ms(), 20)));
        let (stopping, going_on) = (executor.clone(), executor.clone());
        executor.after(5, WORLD, move || stopping.stop(life));
        executor.after(30, WORLD, move || going_on.go_on(life));
        while executor.turn() {}
        assert_eq!(*told.borrow(), [(30, 10), (30, 20), (40, 40)]);
    }
}
