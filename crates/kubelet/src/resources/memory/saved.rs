//! `memory_manager_state`, upstream's file of who has which memory.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Block, Given, NodeState};
use crate::resources::checkpoint::{self, Corrupt};
use crate::resources::topology::Mask;

/// Its name, in the kubelet's root.
pub(in crate::resources) const NAME: &str = "memory_manager_state";
const POLICY: &str = "Static";

/// The fields that all versions have, and a text of them which newer ones read instead.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(flatten)]
    fields: Fields,
    #[serde(default)]
    checksum: u64,
    #[serde(default)]
    data: String,
    #[serde(default)]
    data_checksum: u64,
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Fields {
    policy_name: String,
    #[serde(default)]
    machine_state: BTreeMap<usize, SavedNode>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    entries: BTreeMap<String, BTreeMap<String, Vec<SavedBlock>>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SavedNode {
    number_of_assignments: usize,
    memory_map: BTreeMap<String, Table>,
    cells: Vec<usize>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Table {
    total: u64,
    system_reserved: u64,
    allocatable: u64,
    reserved: u64,
    free: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SavedBlock {
    numa_affinity: Vec<usize>,
    #[serde(rename = "type")]
    resource: String,
    size: u64,
}

impl Fields {
    fn of(nodes: &BTreeMap<usize, NodeState>, given: &Given) -> Self {
        let blocks = |blocks: &Vec<Block>| blocks.iter().map(SavedBlock::of).collect();
        let pod =
            |pod: &BTreeMap<String, Vec<Block>>| pod.iter().map(|(name, all)| (name.clone(), blocks(all))).collect();
        Self {
            policy_name: POLICY.to_owned(),
            machine_state: nodes.iter().map(|(number, node)| (*number, SavedNode::of(node))).collect(),
            entries: given.iter().map(|(uid, containers)| (uid.clone(), pod(containers))).collect(),
        }
    }

    /// The text whose sum older versions take.
    fn spew(&self) -> String {
        let table = |table: &Table| {
            format!(
                "<*>{{TotalMemSize:(uint64){} SystemReserved:(uint64){} Allocatable:(uint64){} Reserved:(uint64){} \
                 Free:(uint64){}}}",
                table.total, table.system_reserved, table.allocatable, table.reserved, table.free
            )
        };
        let node = |node: &SavedNode| {
            format!(
                "<*>{{NumberOfAssignments:(int){} MemoryMap:(map[v1.ResourceName]*state.MemoryTable){} Cells:([]int){}}}",
                node.number_of_assignments,
                checkpoint::map(node.memory_map.iter().map(|(name, amounts)| (name, table(amounts)))),
                checkpoint::list(&node.cells),
            )
        };
        let block = |block: &SavedBlock| {
            format!(
                "{{NUMAAffinity:([]int){} Type:(v1.ResourceName){} Size:(uint64){}}}",
                checkpoint::list(&block.numa_affinity),
                block.resource,
                block.size,
            )
        };
        let container = |blocks: &Vec<SavedBlock>| checkpoint::list(blocks.iter().map(block));
        let pod = |pod: &BTreeMap<String, Vec<SavedBlock>>| {
            checkpoint::map(pod.iter().map(|(name, blocks)| (name, container(blocks))))
        };
        format!(
            "(*state.MemoryManagerCheckpoint){{PolicyName:(string){} MachineState:(state.NUMANodeMap){} \
             Entries:(state.ContainerMemoryAssignments){} Checksum:(checksum.Checksum)0}}",
            self.policy_name,
            checkpoint::map(self.machine_state.iter().map(|(number, state)| (number, node(state)))),
            checkpoint::map(self.entries.iter().map(|(uid, containers)| (uid, pod(containers)))),
        )
    }
}

impl SavedNode {
    fn of(node: &NodeState) -> Self {
        let table = |amounts: &super::Amounts| Table {
            total: amounts.total,
            system_reserved: amounts.system,
            allocatable: amounts.allocatable,
            reserved: amounts.given,
            free: amounts.free(),
        };
        Self {
            number_of_assignments: node.blocks,
            memory_map: node.amounts.iter().map(|(name, amounts)| (name.clone(), table(amounts))).collect(),
            cells: node.group.nodes().collect(),
        }
    }
}

impl SavedBlock {
    fn of(block: &Block) -> Self {
        Self { numa_affinity: block.nodes.nodes().collect(), resource: block.resource.clone(), size: block.bytes }
    }
}

pub(super) fn write(nodes: &BTreeMap<usize, NodeState>, given: &Given) -> Vec<u8> {
    let fields = Fields::of(nodes, given);
    let data = serde_json::to_string(&fields).expect("all keys are strings or numbers");
    let (checksum, data_checksum) = (checkpoint::sum(&fields.spew()), checkpoint::sum(&format!("(string){data}")));
    let file = File { fields, checksum, data, data_checksum };
    serde_json::to_vec(&file).expect("all keys are strings or numbers")
}

/// What is given, as such a file says. One of another policy says nothing.
pub(super) fn read(bytes: &[u8]) -> Result<Given, Corrupt> {
    // By way of a value: keys that are numbers pass through no flattened structure.
    let mut file: serde_json::Value = serde_json::from_slice(bytes)?;
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
    let fields: Fields = match file["data"].as_str().filter(|data| !data.is_empty()) {
        Some(data) => {
            checkpoint::verify(number(&file["dataChecksum"]), &format!("(string){data}"))?;
            serde_json::from_str(data)?
        }
        None => {
            let checksum = number(&file["checksum"]);
            let fields: Fields = serde_json::from_str(&std::mem::take(&mut file).to_string())?;
            checkpoint::verify(checksum, &fields.spew())?;
            fields
        }
    };
    if fields.policy_name != POLICY {
        return Ok(Given::new());
    }
    let block =
        |block: SavedBlock| Block { nodes: Mask::of(block.numa_affinity), resource: block.resource, bytes: block.size };
    let pod = |pod: BTreeMap<String, Vec<SavedBlock>>| {
        pod.into_iter().map(|(name, blocks)| (name, blocks.into_iter().map(block).collect())).collect()
    };
    Ok(fields.entries.into_iter().map(|(uid, containers)| (uid, pod(containers))).collect())
}

#[cfg(test)]
mod tests {
    use super::super::Amounts;
    use super::*;

    fn nodes() -> BTreeMap<usize, NodeState> {
        let amounts = |total, system, allocatable, given| Amounts { total, system, allocatable, given };
        let table = [("hugepages-1Gi".to_owned(), amounts(0, 0, 0, 0)), ("memory".to_owned(), amounts(5, 4, 3, 2))];
        [(0, NodeState { blocks: 1, group: Mask::of([0, 1]), amounts: table.into() })].into()
    }

    fn given() -> Given {
        let block = Block { nodes: Mask::of([0]), resource: "memory".into(), bytes: 1024 };
        [("u".to_owned(), [("c".to_owned(), vec![block])].into())].into()
    }

    #[test]
    fn the_text_is_gos() {
        // What `k8s.io/utils/dump.ForHash` says, with upstream's names of the types.
        let expected = "(*state.MemoryManagerCheckpoint){PolicyName:(string)Static MachineState:(state.NUMANodeMap)map[\
            0:<*>{NumberOfAssignments:(int)1 MemoryMap:(map[v1.ResourceName]*state.MemoryTable)map[\
            hugepages-1Gi:<*>{TotalMemSize:(uint64)0 SystemReserved:(uint64)0 Allocatable:(uint64)0 Reserved:(uint64)0 \
            Free:(uint64)0} memory:<*>{TotalMemSize:(uint64)5 SystemReserved:(uint64)4 Allocatable:(uint64)3 \
            Reserved:(uint64)2 Free:(uint64)1}] Cells:([]int)[0 1]}] Entries:(state.ContainerMemoryAssignments)map[\
            u:map[c:[{NUMAAffinity:([]int)[0] Type:(v1.ResourceName)memory Size:(uint64)1024}]]] \
            Checksum:(checksum.Checksum)0}";
        assert_eq!(Fields::of(&nodes(), &given()).spew(), expected);
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = write(&nodes(), &given());
        assert_eq!(read(&bytes).unwrap(), given());
        let text = String::from_utf8(bytes).unwrap();
        assert!(matches!(read(text.replace("1024", "1025").as_bytes()), Err(Corrupt::Checksum { .. })));
        let mut old: serde_json::Value = serde_json::from_str(&text).unwrap();
        old.as_object_mut().unwrap().retain(|name, _| !name.starts_with("data"));
        assert_eq!(read(old.to_string().as_bytes()).unwrap(), given());
        old["entries"]["u"]["c"][0]["size"] = 1.into();
        assert!(read(old.to_string().as_bytes()).is_err());
    }
}
