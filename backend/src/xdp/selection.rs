//! The classes of packets that are wanted of a device, while the device comes and goes.

use super::program::{Class, Classes};
use super::{XdpError, lock};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex};

/// Classes that one device may have, which is what the program's maps hold of each kind.
pub const MAX_CLASSES: usize = 65536;

/// What is wanted, and what is taken of it. All else is the kernel's.
#[derive(Default)]
pub struct Selection(Mutex<State>);

#[derive(Default)]
struct State {
    taken: BTreeSet<Class>,
    /// Wanted, and the kernel's for now.
    waiting: BTreeSet<Class>,
    /// The program's, while the device is open.
    maps: Option<Arc<Mutex<Classes>>>,
    /// Why something waits, if not for lack of room.
    error: Option<String>,
}

impl State {
    fn take(&mut self, class: Class) {
        let taken = match &self.maps {
            _ if self.taken.len() >= MAX_CLASSES => false,
            None => true,
            Some(maps) => match lock(maps).insert(class) {
                Ok(()) => true,
                Err(error) => {
                    self.error = Some(error.to_string());
                    false
                }
            },
        };
        if taken {
            self.waiting.remove(&class);
            self.taken.insert(class)
        } else {
            self.waiting.insert(class)
        };
    }

    fn release(&mut self, class: Class) {
        self.waiting.remove(&class);
        if self.taken.remove(&class)
            && let Some(Err(error)) = self.maps.as_ref().map(|maps| lock(maps).remove(class))
        {
            self.error = Some(error.to_string());
            return;
        }
        self.error = None;
        if let Some(next) = self.waiting.pop_first() {
            self.take(next);
        }
    }
}

impl Selection {
    /// Wants a class, or no longer. It is in force when this returns, if the device is open and there is room.
    pub fn set(&self, class: Class, wanted: bool) {
        let mut state = lock(&self.0);
        if !wanted {
            state.release(class);
        } else if !state.taken.contains(&class) {
            state.take(class);
        }
    }

    /// The device is open: its program takes what is wanted.
    ///
    /// # Errors
    /// The kernel does not let us write.
    pub fn open(&self, maps: Arc<Mutex<Classes>>) -> Result<(), XdpError> {
        let mut state = lock(&self.0);
        {
            let mut maps = lock(&maps);
            state.taken.iter().try_for_each(|&class| maps.insert(class))?;
        }
        (state.maps, state.error) = (Some(maps), None);
        Ok(())
    }

    /// The program takes nothing from now on: the device is closed, or all that it receives is left to the kernel.
    ///
    /// # Errors
    /// The kernel does not let us write.
    pub fn close(&self) -> Result<(), XdpError> {
        let State { taken, maps, .. } = &mut *lock(&self.0);
        let Some(maps) = maps.take() else { return Ok(()) };
        let mut maps = lock(&maps);
        taken.iter().try_for_each(|&class| maps.remove(class).map(drop))
    }

    /// The classes that are to be taken, sorted.
    pub fn taken(&self) -> Vec<Class> {
        lock(&self.0).taken.iter().copied().collect()
    }

    /// How many of them the program takes at the moment.
    pub fn in_force(&self) -> usize {
        let state = lock(&self.0);
        if state.maps.is_some() { state.taken.len() } else { 0 }
    }

    /// What a person should know.
    pub fn warning(&self) -> Option<String> {
        let state = lock(&self.0);
        let left = state.waiting.len();
        match &state.error {
            Some(error) => Some(error.clone()),
            None if left > 0 => {
                Some(format!("{left} classes of packets stay the kernel's: there is room for {MAX_CLASSES}"))
            }
            None => None,
        }
    }
}

impl fmt::Debug for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.taken()).finish()
    }
}

/// Two are the same if they are of the same device.
impl PartialEq for Selection {
    fn eq(&self, other: &Selection) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Selection {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_waits_for_it() {
        let class = |i: usize| Class::Ethertype { ethertype: i as u16, vlan: Some((i >> 16) as u16) };
        let selection = Selection::default();
        (0..MAX_CLASSES + 2).for_each(|i| selection.set(class(i), true));
        selection.set(class(0), true); // once more
        assert_eq!(selection.taken().len(), MAX_CLASSES);
        assert!(selection.warning().unwrap().starts_with("2 classes of packets stay the kernel's"));
        selection.set(class(7), false);
        assert!(!selection.taken().contains(&class(7)) && selection.taken().contains(&class(MAX_CLASSES)));
        selection.set(class(MAX_CLASSES + 1), false);
        assert_eq!((selection.taken().len(), selection.warning()), (MAX_CLASSES, None));
    }
}
