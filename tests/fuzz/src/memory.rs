//! How much memory a piece of code has at most at one time: the bound that hostile input must not break.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting by thread. A program that wants memory judged makes it its global allocator.
pub struct Counting;

/// The most bytes that `f` had allocated at a time on this thread; 0 where nobody counts.
pub(crate) fn peak(f: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    f();
    usize::try_from(PEAK.get() - before).unwrap_or(0)
}

fn count(change: isize) {
    // At a thread's end the cells may be gone already; nobody asks then.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

/// No object is larger than `isize::MAX`, by the rules for layouts.
fn size(layout: Layout) -> isize {
    layout.size() as isize
}

// SAFETY: every call goes to the system's allocator unchanged, which keeps the trait's promises; counting neither
// allocates (the cells are constants without destructors) nor touches the memory.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(size(layout));
        // SAFETY: the caller keeps `alloc`'s contract, and it is the same here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-size(layout));
        // SAFETY: `pointer` came from `System` by `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}
